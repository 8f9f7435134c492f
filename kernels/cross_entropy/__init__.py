"""Cross-entropy of a language-model head without its logits. Start with contract.py."""

from titans_pretrain.kernels.cross_entropy.contract import linear_cross_entropy
from titans_pretrain.kernels.cross_entropy.vocabulary_split import VocabularySplit

__all__ = ["VocabularySplit", "linear_cross_entropy"]
