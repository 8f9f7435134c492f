"""Cross-entropy of a language-model head without its logits."""

from titans_pretrain.kernels.cross_entropy.linear import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
