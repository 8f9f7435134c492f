"""Cross-entropy of a linear head, chunk by chunk: the logits of a long sequence never exist at once.

torch.nn.functional.linear_cross_entropy chunks only from torch 2.13 on (behind `options`; without it, it forms all
logits), and returns the summed loss of bfloat16 inputs in bfloat16.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, log_softmax, nll_loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int = 1024,
    group: "dist.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of softmax(hidden @ weight.T) at `labels`, and how many there were.

    Args:
        hidden: [N, D]; sets the dtype of the logits (under autocast: autocast's).
        weight: [V, D], of any floating dtype.
        labels: [N] int64, in [0, V) or `ignore_index`. Checked on CPU; elsewhere torch's device assertion speaks.
        chunk_tokens: rows whose logits exist at a time, forward and backward.
        group: ranks that share the vocabulary (Megatron-LM, Shoeybi et al. 2019, section 3): weight is [V / ranks, D], this
            rank's rows in the order of the ranks; hidden and labels are the same on all. Every rank returns the whole loss
            and the gradient of its own rows; its gradient of hidden is a part, which the caller sums over the ranks.

    Returns:
        loss_sum, a scalar (float32; float64 for float64 inputs; 0 with zero gradients when all labels are ignored), and
        count, an int64 scalar. The softmax and the sums, that of weight's gradient too, run in float32 or better.

    Raises:
        ValueError: a shape, dtype or label that does not fit; one line that names the argument.
    """
    _check(hidden, weight, labels, ignore_index, chunk_tokens, len(weight) * (1 if group is None else group.size()))
    dtype = hidden.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    if (
        not torch.is_grad_enabled()
    ):  # inside a Function no one could tell: weight would be taken for one that needs a gradient
        hidden, weight = hidden.detach(), weight.detach()
    loss = _LinearCrossEntropy.apply(hidden, weight, labels, ignore_index, chunk_tokens, group, dtype)
    return loss, (labels != ignore_index).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Takes the gradients in the forward pass, while a chunk's logits exist, and only scales them in the backward pass:
    three matrix products per chunk where recomputing the logits would need four."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, ignore_index, chunk_tokens, group, dtype):
        sums = torch.promote_types(dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        head = weight.to(dtype)
        loss = torch.zeros((), dtype=sums, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if need_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                part, target = hidden[rows].to(dtype), labels[rows]
                logits, kept = linear(part, head), target != ignore_index
                if group is None:
                    losses, grad = _cross_entropy(logits, target.where(kept, 0), sums)
                else:
                    losses, grad = _sharded_cross_entropy(logits, target.where(kept, 0), sums, group)
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
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _cross_entropy(logits: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss of each row [N] and its gradient [N, V]; logits [N, V], target [N] in [0, V)."""
    log_probs = log_softmax(logits, -1, dtype=dtype)
    losses = nll_loss(log_probs, target, reduction="none")
    return losses, log_probs.exp_().scatter_add_(1, target[:, None], -losses.new_ones(len(target), 1))


def _sharded_cross_entropy(
    logits: Tensor, target: Tensor, dtype: torch.dtype, group: "dist.ProcessGroup"
) -> tuple[Tensor, Tensor]:
    """The same where each rank of the group has some columns [N, V / ranks] of the logits; the gradient is of these columns.

    megatron-core's vocab_parallel_cross_entropy computes in float32 whatever it is given, and keeps the softmax of all rows."""
    logits = logits.to(dtype)
    highest = logits.amax(-1, keepdim=True)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    rank, columns = group.rank(), logits.shape[1]
    column = target[:, None] - rank * columns
    # Outer ranks keep what lies outside the vocabulary, for the assertion in torch's gather.
    here = ((column >= 0) | (rank == 0)) & ((column < columns) | (rank == group.size() - 1))
    column = column.where(here, 0)
    at_target = logits.sub_(highest).gather(1, column) * here
    exps = logits.exp_()
    sums = torch.cat((exps.sum(-1, keepdim=True), at_target), 1)
    dist.all_reduce(sums, group=group)
    total, at_target = sums.split(1, 1)
    grad = exps.div_(total).scatter_add_(1, column, -here.to(dtype))
    return (total.log() - at_target).squeeze(1), grad


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, also where total is wider than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


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
    if labels.device.type == "cpu":
        wrong = labels[((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)]
        if len(wrong):
            raise ValueError(
                f"labels holds {wrong[0].item()}; legal are 0 to {vocabulary - 1} and ignore_index={ignore_index}"
            )
