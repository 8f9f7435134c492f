"""One memory over several ranks, each with its part of the hidden size F (README.md, "Split over ranks").

A value is full (the same on every rank), a rank's own part of F, or partial: the ranks' values add up to the full one. Sums are
identical on all ranks, so what is full stays so to the bit as long as it is a function of full values alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HiddenSplit:
    """How the ranks that share a memory meet; the scan knows no more of them. Both functions are differentiable, once.

    ranks: how many hold a part
    copy: a full x where it meets a rank's part: x itself. Its gradient there is partial, and summed
    sum: a partial x (contiguous, needed by no other gradient), summed in place. The sum's gradient is full and each rank's own
    """

    ranks: int
    copy: Callable[[Tensor], Tensor]
    sum: Callable[[Tensor], Tensor]

    def sum_together(self, parts: list[Tensor]) -> list[Tensor]:
        """Partial tensors of one dtype, summed in one message. Not differentiable."""
        if self.ranks == 1:
            return parts
        flat = self.sum(torch.cat([x.reshape(-1) for x in parts]))
        return [x.view_as(like) for x, like in zip(flat.split([x.numel() for x in parts]), parts, strict=True)]

    def check(self, depth: int) -> None:
        """Raises ValueError unless a memory of this depth can be split."""
        if self.ranks > 1 and depth != 2:
            raise ValueError(
                f"hidden_split is for memories of depth 2 only, where one sum per chunk is enough; this one has depth {depth}: "
                "split its heads instead"
            )


def _same(x: Tensor) -> Tensor:
    return x


WHOLE = HiddenSplit(1, _same, _same)
