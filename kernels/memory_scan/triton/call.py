"""What the driver hands to the kernels, as values.

B batch, T tokens, H heads, N = B * H, D head size, F rows of the last matrix, NT tiles of a group, BT tokens of a tile, G gates.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.triton.launch import Row


@dataclass(frozen=True)
class Call:
    """One call of the scan: no tensor in it."""

    batch: int
    tokens: int
    heads: int
    dim: int
    hidden: int  # F; D where depth is 1
    depth: int
    gates: int  # 1, or one per memory layer
    chunk: int
    tile: int  # BT
    offset: int  # tokens of the first chunk that earlier calls have read
    residual_norm: bool
    eps: float  # of the damped inner gradient
    to_initial: bool
    resets: bool
    dtype: torch.dtype  # of the products' operands
    row: Row
    group: int  # tiles whose states are held at a time: whole chunks

    @property
    def n(self) -> int:
        return self.batch * self.heads

    @property
    def chunks(self) -> int:
        """Touched by the call."""
        return -(-(self.offset + self.tokens) // self.chunk)

    @property
    def ends_half(self) -> bool:
        return (self.offset + self.tokens) % self.chunk > 0

    def groups(self) -> list["Group"]:
        """Runs of whole chunks, but for those that the call cuts."""
        first, stop = self.offset // self.tile, -(-(self.offset + self.tokens) // self.tile)
        bounds = range(0, stop, self.group)
        return [
            Group(max(first, start), min(stop, start + self.group)) for start in bounds if start + self.group > first
        ]


@dataclass(frozen=True)
class Group:
    """Tiles [first, stop) of a call, counted from the start of its first chunk."""

    first: int
    stop: int

    @property
    def tiles(self) -> int:
        return self.stop - self.first


class Tokens(NamedTuple):
    """q, k, v [B, T, H, D] and the gates [B, T, H, G], contiguous, each in its own dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    forget: Tensor
    momentum: Tensor
    lr: Tensor


class Matrices(NamedTuple):
    """Slots of the state: V = W, or W - W_init where forgetting goes there, and S, of both layers. Where depth is 1 the first
    layer's are the last's, and no kernel looks at them."""

    v1: Tensor  # [N, ..., D, F]
    s1: Tensor
    v2: Tensor  # [N, ..., F, D]
    s2: Tensor

    @staticmethod
    def empty(call: Call, *between: int, dtype: torch.dtype, device: torch.device) -> "Matrices":
        """Matrices [N, *between, d_in, d_out]."""

        def new(rows: int, columns: int) -> Tensor:
            return torch.empty(call.n, *between, rows, columns, dtype=dtype, device=device)

        last = [new(call.hidden, call.dim) for _ in range(2)]
        first = [new(call.dim, call.hidden) for _ in range(2)] if call.depth == 2 else last
        return Matrices(*first, *last)


class Tables(NamedTuple):
    """Decay tables of a group (chunked/tables.py), float32, or their gradients."""

    G: Tensor  # [N, G, NT, BT, BT]
    read: Tensor  # [N, G, NT, BT, 2]: beta, f
    last: Tensor  # [N, G, NT, BT, 2]: the last rows of G and N
    carry: Tensor  # [N, G, NT, 4]: beta, f, m of the last row; the fourth is unused

    @staticmethod
    def empty(call: Call, group: Group, device: torch.device) -> "Tables":
        b = call.tile
        shapes = ((b, b), (b, 2), (b, 2), (4,))
        return Tables(*(torch.empty(call.n, call.gates, group.tiles, *s, device=device) for s in shapes))


class Given(NamedTuple):
    """What the kernels read of a group besides its tokens and tables. dt: Call.dtype; the rest is float32."""

    states: Matrices  # dt, [N, 1 + NT, .]: before the group's tile i, after a reset, at slot 1 + i; slot 0: the anchor, as V
    towards: tuple[Tensor, Tensor]  # dt, W_init [N, D, F] and [N, F, D]; not looked at unless forgetting goes there
    e: Tensor  # dt [N, T, D]: the last layer's deltas of the whole call
    n: Tensor  # dt [N, T, D]: LN(z_L) of the keys; not looked at without residual_norm
    rstd: Tensor  # [N, T]
    reset: Tensor  # [B, chunks] bool; not looked at without resets


class ReadGradients(NamedTuple):
    """What the reads of a group leave for the walk back over its states. TG = NT * BT rows; those that do not exist hold zeros."""

    x: Tensor  # dt [N, TG, F]: inputs of the last layer
    d_p1: Tensor  # dt [N, TG, F]: gradient at the first layer's pre-activations (depth 2)
    d_p2: Tensor  # dt [N, TG, D]: gradient at y, before the norm
    d_a: Tensor  # dt [N, TG, F]: of the keys' inputs of the last layer (depth 2; where it is 1 they are the keys: in d_k)
    d_e1: Tensor  # dt [N, TG, F] (depth 2)
    d_e2: Tensor  # float32 [N, TG, D]


class Carried(NamedTuple):
    """Gradients that go back from tile to tile, float32, changed in place: [N, d_in, d_out] each."""

    state: Matrices  # of V and S after the tile
    anchor: tuple[Tensor, Tensor]  # of the chunk's anchor
    towards: tuple[Tensor, Tensor]  # of W_init, where forgetting goes there
    initial: Matrices  # of the state where documents start, with resets
