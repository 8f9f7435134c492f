"""What the driver hands to the kernels, as values.

B batch, T tokens, H heads, N = B * H, D head size, F rows of the last matrix, NT tiles of a group, BT tokens of a tile, G gates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.triton.launch import Row, row_of, tile_of

GROUP_BYTES = 256 * 2**20  # of a group's kept states, unless one chunk has more


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
    per_group: int  # tiles

    @staticmethod
    def of(
        x: "Tokens", weights: Sequence[Tensor], offset: int, chunk: int, residual_norm: bool, damping: float, to_initial: bool,
        resets: bool, checkpoint_every: int | None,
    ) -> "Call":  # fmt: skip
        """Of a call that the table of launches has a row for. checkpoint_every: chunks of a group; None: what GROUP_BYTES hold."""
        batch, tokens, heads, dim = x.q.shape
        dim, hidden = int(dim), int(weights[-1].shape[-2])  # not symbols, where torch.compile has some
        depth = len(weights)
        row, tile = row_of(depth, dim, hidden), tile_of(chunk)
        assert row is not None and tile is not None
        dtype = x.v.dtype if x.v.dtype in (torch.bfloat16, torch.float16) else torch.float32
        if checkpoint_every is None:
            checkpoint_every = GROUP_BYTES // (
                batch * heads * 2 * depth * dim * hidden * dtype.itemsize * (chunk // tile)
            )
        return Call(
            batch, tokens, heads, dim, hidden, depth, x.forget.shape[-1], chunk, tile, offset, residual_norm,
            damping * hidden if residual_norm else 0.0, to_initial, resets, dtype, row, max(1, checkpoint_every) * (chunk // tile),
        )  # fmt: skip

    @property
    def n(self) -> int:
        return self.batch * self.heads

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Of each layer's matrix."""
        return [(self.dim, self.hidden), (self.hidden, self.dim)][-self.depth :]

    @property
    def end(self) -> int:
        """Tokens from the start of the first chunk."""
        return self.offset + self.tokens

    @property
    def chunks(self) -> int:
        """Touched by the call."""
        return -(-self.end // self.chunk)

    @property
    def ends_half(self) -> bool:
        return self.end % self.chunk > 0

    @property
    def opens_last(self) -> bool:
        """Does the call open its last chunk? Else it lies inside one that an earlier call has opened."""
        return self.offset == 0 or self.end > self.chunk

    @property
    def checkpoints(self) -> int:
        """Groups but the first."""
        return -(-self.end // (self.tile * self.per_group)) - 1 + self._cuts_before_last()

    def groups(self) -> list["Group"]:
        """Runs of whole chunks, but for those that the call cuts. A half-read last chunk that the call opens has its own group: its
        anchor is the state at the group's start."""
        first, stop = self.offset // self.tile, -(-self.end // self.tile)
        bounds = [*range(0, stop, self.per_group), stop]
        if self._cuts_before_last():
            bounds.insert(-1, self._last_opener())
        return [Group(max(first, start), end) for start, end in pairwise(bounds)]

    def _last_opener(self) -> int:
        return self.end // self.chunk * (self.chunk // self.tile)

    def _cuts_before_last(self) -> int:
        return int(self.ends_half and self.opens_last and self._last_opener() % self.per_group > 0)


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
    def of(slots: Sequence[Tensor]) -> "Matrices":
        """slots: V and S of each layer in turn."""
        return Matrices(*slots[:2], *slots[-2:])

    @staticmethod
    def empty(call: Call, *between: int, dtype: torch.dtype, device: torch.device) -> "Matrices":
        """Matrices [N, *between, d_in, d_out]."""
        sizes = [(call.n, *between, *size) for size in call.sizes for _ in range(2)]
        return Matrices.of([torch.empty(size, dtype=dtype, device=device) for size in sizes])

    def slots(self) -> list[Tensor]:
        """The inverse of `of`."""
        return list(self) if self.v1 is not self.v2 else list(self[2:])

    def weights(self) -> list[Tensor]:
        return self.slots()[::2]

    def surprise(self) -> list[Tensor]:
        return self.slots()[1::2]


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
    reset: Tensor  # [B, chunks] uint8; not looked at without resets


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
