"""How a call is cut into the kernels' tiles, and comparison, for tests of one kernel at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileRows:
    index: int  # in the call's buffers
    chunk: int  # counted from the call's first
    opens_chunk: bool
    rows: slice  # of the tile's BT rows, those that exist
    positions: slice  # theirs in the call


@dataclass(frozen=True)
class Call:
    """tokens: of the call; offset: tokens of its first chunk that earlier calls read; BT: rows of a tile; C: of a chunk."""

    tokens: int
    offset: int
    BT: int
    C: int = 0
    B: int = 2
    H: int = 2

    @property
    def N(self) -> int:
        return self.B * self.H

    @property
    def first(self) -> int:
        return self.offset // self.BT

    @property
    def tiles(self) -> list[TileRows]:
        found, C = [], self.C or self.BT
        for i in range(self.first, -(-(self.tokens + self.offset) // self.BT)):
            start = i * self.BT - self.offset
            low, high = max(start, 0), min(start + self.BT, self.tokens)
            opens = i * self.BT % C == 0 and start >= 0
            found.append(TileRows(i - self.first, i * self.BT // C, opens, slice(low - start, high - start), slice(low, high)))
        return found

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(self.N, *shape, dtype=torch.float64)

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, H, n] -> [B H, T, n], to read."""
        return x.transpose(1, 2).flatten(0, 1)


def assert_close(actual: Tensor, expected: Tensor, tol: float, name: str) -> None:
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-3)
    assert error < tol, f"{name}: relative error {error:.2e}"
