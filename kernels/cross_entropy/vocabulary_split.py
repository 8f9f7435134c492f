"""A vocabulary whose rows lie on several ranks."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VocabularySplit:
    """How the ranks meet that each hold V / ranks rows of the head, in their order; the loss knows no more of them.

    sum, max: x with the ranks' values summed, or the largest of them, in place and the same to the bit on all ranks. Not
    differentiable
    """

    rank: int
    ranks: int
    sum: Callable[[Tensor], Tensor]
    max: Callable[[Tensor], Tensor]
