"""Cross-entropy of a linear head, chunk by chunk: the logits of a long sequence never exist at once.

torch.nn.functional.linear_cross_entropy chunks only from torch 2.13 on (behind `options`; without it, it forms all
logits), and returns the summed loss of bfloat16 inputs in bfloat16.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, log_softmax, nll_loss

from titans_pretrain.kernels.cross_entropy.vocabulary_split import VocabularySplit


def loss_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int, chunk_tokens: int,
    vocabulary_split: VocabularySplit | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See linear_cross_entropy; arguments are validated there. dtype: of the logits."""
    wanted = torch.is_grad_enabled()  # inside a Function it is off
    need_hidden, need_weight = (wanted and x.requires_grad for x in (hidden, weight))
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, ignore_index, chunk_tokens, vocabulary_split, dtype, need_hidden, need_weight
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """Takes the gradients in the forward pass, while a chunk's logits exist, and only scales them in the backward pass:
    three matrix products per chunk where recomputing the logits would need four."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, ignore_index, chunk_tokens, split, dtype, need_hidden, need_weight):
        sums = torch.promote_types(dtype, torch.float32)
        head = weight.to(dtype)
        loss = torch.zeros((), dtype=sums, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if need_weight else None
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            part, target = hidden[rows].to(dtype), labels[rows]
            logits, kept = linear(part, head), target != ignore_index
            if split is None:
                losses, grad = _cross_entropy(logits, target.where(kept, 0), sums)
            else:
                losses, grad = _split_cross_entropy(logits, target.where(kept, 0), sums, split)
            loss += losses.where(kept, 0).sum()
            if not (need_hidden or need_weight):
                continue
            grad = grad.mul_(kept[:, None]).to(dtype)
            if need_hidden:
                grad_hidden[rows] = (grad @ head).to(hidden.dtype)
            if need_weight:
                _add_product(grad_weight, grad.t(), part)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:  # scaled in full: 1 / tokens in bfloat16 is off by up to 0.4 %, for all of it alike
            grad_hidden = (grad_hidden.to(grad_loss.dtype) * grad_loss).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 7


def _cross_entropy(logits: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss of each row [N] and its gradient [N, V]; logits [N, V], target [N] in [0, V)."""
    log_probs = log_softmax(logits, -1, dtype=dtype)
    losses = nll_loss(log_probs, target, reduction="none")
    return losses, log_probs.exp_().scatter_add_(1, target[:, None], -losses.new_ones(len(target), 1))


def _split_cross_entropy(
    logits: Tensor, target: Tensor, dtype: torch.dtype, split: VocabularySplit
) -> tuple[Tensor, Tensor]:
    """The same where each rank has some columns [N, V / ranks] of the logits; the gradient is of these columns.

    megatron-core's vocab_parallel_cross_entropy computes in float32 whatever it is given, and keeps the softmax of all rows."""
    logits = logits.to(dtype)
    highest = split.max(logits.amax(-1, keepdim=True))
    columns = logits.shape[1]
    column = target[:, None] - split.rank * columns
    # Outer ranks keep what lies outside the vocabulary, for the assertion in torch's gather.
    here = ((column >= 0) | (split.rank == 0)) & ((column < columns) | (split.rank == split.ranks - 1))
    column = column.where(here, 0)
    at_target = logits.sub_(highest).gather(1, column) * here
    exps = logits.exp_()
    sums = split.sum(torch.cat((exps.sum(-1, keepdim=True), at_target), 1))
    total, at_target = sums.split(1, 1)
    grad = exps.div_(total).scatter_add_(1, column, -here.to(dtype))
    return (total.log() - at_target).squeeze(1), grad


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, also where total is wider than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
