"""The public loss of a linear head: one contract, several backends."""

import torch
from torch import Tensor

from titans_pretrain.kernels.backends import Backend, autocast_dtype, choose, values_at_hand, without_autocast
from titans_pretrain.kernels.cross_entropy import chunked, reference
from titans_pretrain.kernels.cross_entropy.vocabulary_split import VocabularySplit

# In the order in which "auto" tries them.
BACKENDS = (Backend("chunked", chunked.loss_sum), Backend("reference", reference.loss_sum, reference.refuses))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int = 1024,
    vocabulary_split: VocabularySplit | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of softmax(hidden @ weight.T) at `labels`, and how many there were.

    Args:
        hidden: [N, D]; sets the dtype of the logits (under autocast: autocast's).
        weight: [V, D], of any floating dtype.
        labels: [N] int64, in [0, V) or `ignore_index`. Checked on CPU; elsewhere torch's device assertion speaks.
        chunk_tokens: rows whose logits exist at a time, forward and backward.
        vocabulary_split: how ranks meet that share the vocabulary (Megatron-LM, Shoeybi et al. 2019, section 3): weight is
            [V / ranks, D], this rank's rows; hidden and labels are the same on all. Every rank returns the whole loss and the
            gradient of its own rows; its gradient of hidden is a part, which the caller sums over the ranks.
        backend: "auto", "chunked" (logits of chunk_tokens rows at a time) or "reference" (all of them at once, the oracle).

    Returns:
        loss_sum, a scalar (float32; float64 for float64 inputs; 0 with zero gradients when all labels are ignored), and
        count, an int64 scalar. The softmax and the sums, that of weight's gradient too, run in float32 or better.

    Raises:
        ValueError: a shape, dtype, label or backend that does not fit; one line that names the argument.
    """
    ranks = 1 if vocabulary_split is None else vocabulary_split.ranks
    _check(hidden, weight, labels, ignore_index, chunk_tokens, len(weight) * ranks)
    dtype = hidden.dtype
    if dtype != torch.float64:
        dtype = autocast_dtype(hidden) or dtype
    arguments = dict(
        hidden=hidden, weight=weight, labels=labels, ignore_index=ignore_index, chunk_tokens=chunk_tokens,
        vocabulary_split=vocabulary_split, dtype=dtype,
    )  # fmt: skip
    with without_autocast(hidden):
        loss = choose("linear_cross_entropy", BACKENDS, backend, arguments).run(**arguments)
    return loss, (labels != ignore_index).sum()


def _check(hidden, weight, labels, ignore_index, chunk_tokens, vocabulary) -> None:
    if hidden.dim() != 2 or 0 in hidden.shape:
        raise ValueError(f"hidden must be [N, D] with no empty dimension, got {tuple(hidden.shape)}")
    for name, value in (("hidden", hidden), ("weight", weight)):
        if not value.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight is {tuple(weight.shape)}; it must be [V, D] with D={hidden.shape[1]} as in hidden")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels is {tuple(labels.shape)} {labels.dtype}; it must be {(len(hidden),)} torch.int64")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be 1 or more, got {chunk_tokens}")
    if values_at_hand(labels):
        wrong = labels[((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)]
        if len(wrong):
            raise ValueError(
                f"labels holds {wrong[0].item()}; legal are 0 to {vocabulary - 1} and ignore_index={ignore_index}"
            )
