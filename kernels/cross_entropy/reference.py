"""The oracle: all logits at once, gradients by automatic differentiation, any dtype."""

import torch
from torch import Tensor

from titans_pretrain.kernels.cross_entropy.vocabulary_split import VocabularySplit


def loss_sum(hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int, dtype: torch.dtype, **_) -> Tensor:
    """See linear_cross_entropy; arguments are validated there. dtype: of the logits."""
    logits = hidden.to(dtype) @ weight.to(dtype).mT
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    kept = labels != ignore_index
    at_label = logits.gather(1, labels.where(kept, 0)[:, None]).squeeze(1)
    return (logits.logsumexp(1) - at_label).where(kept, 0).sum()


def refuses(*, vocabulary_split: VocabularySplit | None, **_) -> str | None:
    return None if vocabulary_split is None else "vocabulary_split: it has the whole vocabulary on one rank"
