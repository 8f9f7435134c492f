"""One memory over the ranks of a process group, each with its part of the hidden size F (README.md, "Split over ranks").

A value is full (the same on every rank), a rank's own part of F, or partial: the ranks' values add up to the full one. Sums are
identical on all ranks, so what is full stays so to the bit as long as it is a function of full values alone. The group is None
where one rank holds the whole memory; then nothing here does anything.
"""

from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

HiddenGroup: TypeAlias = "dist.ProcessGroup | None"  # a string: not every build of torch has process groups


def check_split(hidden_group: HiddenGroup, depth: int) -> None:
    """Raises ValueError unless a memory of this depth can be split over the group."""
    if hidden_group is None:
        return
    if depth != 2:
        raise ValueError(
            f"hidden_group splits memories of depth 2 only, where one sum per chunk is enough; this one has depth {depth}: "
            "split its heads instead"
        )
    if dist.get_rank(hidden_group) < 0:
        raise ValueError("this rank is not in hidden_group; give the group it holds a part of the memory for, or None")


def copy_to_ranks(x: Tensor, hidden_group: HiddenGroup) -> Tensor:
    """A full x where it meets a rank's part: x itself. Its gradient there is partial, and summed."""
    return x if hidden_group is None else _Copy.apply(x, hidden_group)


def sum_over_ranks(x: Tensor, hidden_group: HiddenGroup) -> Tensor:
    """A partial x, summed in place (contiguous, needed by no other gradient). The sum's gradient is full and each rank's own."""
    return x if hidden_group is None else _Sum.apply(x, hidden_group)


def sum_together(parts: list[Tensor], hidden_group: HiddenGroup) -> list[Tensor]:
    """Partial tensors of one dtype, summed in one message. Not differentiable."""
    if hidden_group is None:
        return parts
    flat = torch.cat([x.reshape(-1) for x in parts])
    dist.all_reduce(flat, group=hidden_group)
    return [x.view_as(like) for x, like in zip(flat.split([x.numel() for x in parts]), parts, strict=True)]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden_group):
        ctx.group = hidden_group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        d = d.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(d, group=ctx.group)
        return d, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden_group):
        dist.all_reduce(x, group=hidden_group)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        return d, None
