"""What a kernel is told of the ranks that it is split over: functions of a process group, and nothing else of it."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_pretrain.kernels.cross_entropy import VocabularySplit
from titans_pretrain.kernels.memory_scan import HiddenSplit


def hidden_split(group: dist.ProcessGroup) -> HiddenSplit:
    """For memories whose hidden size lies on the group's ranks. Raises ValueError on a rank that is not one of them."""
    _check_member(group)
    return HiddenSplit(group.size(), lambda x: _Copy.apply(x, group), lambda x: _Sum.apply(x, group))


def vocabulary_split(group: dist.ProcessGroup) -> VocabularySplit:
    """For a vocabulary whose rows lie on the group's ranks, in their order. Raises ValueError as hidden_split does."""
    _check_member(group)

    def reduce(x: Tensor, op: dist.ReduceOp) -> Tensor:
        dist.all_reduce(x, op, group)
        return x

    return VocabularySplit(
        group.rank(), group.size(), lambda x: reduce(x, dist.ReduceOp.SUM), lambda x: reduce(x, dist.ReduceOp.MAX)
    )


def _check_member(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) < 0:
        raise ValueError("this rank is not in the group; give the group it holds a part for")


class _Copy(torch.autograd.Function):
    """x itself; its gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        d = d.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(d, group=ctx.group)
        return d, None


class _Sum(torch.autograd.Function):
    """x summed over the ranks, in place; its gradient is each rank's own."""

    @staticmethod
    def forward(ctx, x, group):
        dist.all_reduce(x, group=group)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        return d, None
