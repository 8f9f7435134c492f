"""The memory's state as a value: what a prefix leaves behind for the rest of the sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MemoryState:
    """Weights and surprise of a batch of neural memories after some tokens.

    weights, surprise: tuples over the L memory layers of [B, H, d_in, d_out]; float32 (float64 in tests)
    anchor: the weights at the start of the chunk that is half read, or None when `offset` is 0
    offset: tokens of the current chunk already read, 0 <= offset < chunk_size, the same for the whole batch; or int64 [B],
            one for each row, which memory_step alone reads: the anchor is then always given, where it is 0 with any values
    """

    weights: tuple[Tensor, ...]
    surprise: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...] | None = None
    offset: int | Tensor = 0

    @property
    def ragged(self) -> bool:
        """Do the rows stand at offsets of their own?"""
        return isinstance(self.offset, Tensor)

    def __post_init__(self):
        if len(self.weights) != len(self.surprise):
            raise ValueError(
                f"{len(self.weights)} weights but {len(self.surprise)} surprise tensors; give one of each per memory layer"
            )
        fits = self.anchor is not None if self.ragged or self.offset else self.anchor is None
        if not fits:
            raise ValueError(
                f"a half-read chunk needs its anchor and only it has one: offset={self.offset}, anchor given: {self.anchor is not None}"
            )

    @staticmethod
    def initial(weights, batch: int) -> "MemoryState":
        """The state that `batch` sequences start from. weights: over L, [H, d_in, d_out]; surprise is zero."""
        expanded = tuple(w.unsqueeze(0).expand(batch, *w.shape) for w in weights)
        return MemoryState(expanded, tuple(torch.zeros_like(w) for w in expanded))

    @property
    def depth(self) -> int:
        return len(self.weights)

    @property
    def batch(self) -> int:
        return self.weights[0].shape[0]

    def opened(self) -> "MemoryState":
        """The same weights and surprise, with the next token opening a fresh chunk."""
        return MemoryState(self.weights, self.surprise)

    def expand(self, batch: int) -> "MemoryState":
        """A state of batch 1 as one of `batch` (views, no copies)."""
        if self.batch == batch:
            return self
        if self.batch != 1:
            raise ValueError(f"a state of batch {self.batch} can't serve a batch of {batch}; it must be 1 or {batch}")

        def grow(xs):
            return None if xs is None else tuple(x.expand(batch, *x.shape[1:]) for x in xs)

        return MemoryState(grow(self.weights), grow(self.surprise), grow(self.anchor), self.offset)
