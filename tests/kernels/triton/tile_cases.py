"""A call of the scan in float64, tile by tile, as the kernels have it: what each is given and what it should find."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunked.forward import write
from titans_pretrain.kernels.memory_scan.chunked.network import Network, inner_gradient
from titans_pretrain.kernels.memory_scan.chunked.tables import decay_tables
from titans_pretrain.kernels.memory_scan.chunked.tiles import Tile
from titans_pretrain.kernels.memory_scan.hidden_split import WHOLE
from titans_pretrain.kernels.memory_scan.options import ScanOptions
from titans_pretrain.kernels.memory_scan.triton.call import Call, Given, Group, Matrices, Tables, Tokens
from titans_pretrain.kernels.memory_scan.triton.launch import Kernel, Row

if torch.cuda.is_available():
    pytest.skip("a kernel by itself is interpreted, on a machine without a GPU", allow_module_level=True)

FLOAT64 = dict(dtype=torch.float64)


@dataclass
class TileTwin:
    """One tile of the call, float64."""

    index: int  # from the start of the call's first chunk
    opens_chunk: bool
    chunk: int
    rows: slice  # of the tile's BT rows, those that exist
    positions: slice  # theirs in the call
    tile: Tile
    anchor: list[Tensor]


class Case:
    """Random inputs of a call and its tiles. forget: the most of it; where it is 1, z_L can be as small as to amplify rounding."""

    def __init__(
        self, tokens: int, offset: int, *, depth: int = 2, gates: int = 1, norm: bool = True, damping: float = 0.0, to_initial=False,
        resets: bool = False, tile: int = 16, chunk: int = 16, dim: int = 16, hidden: int = 32, block: int = 16, batch: int = 2,
        heads: int = 1, forget: float = 0.5, dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        self.generator = torch.Generator().manual_seed(tokens + offset)
        hidden = dim if depth == 1 else hidden
        options = ScanOptions(chunk, norm, damping, "initial" if to_initial else "zero")
        kernel = Kernel(block, 4, 1)
        self.call = Call(
            batch, tokens, heads, dim, hidden, depth, gates, chunk, tile, offset, norm, damping * hidden if norm else 0.0, to_initial,
            resets, dtype, Row(48, *(kernel,) * 7), 1 << 20,
        )  # fmt: skip
        shape = (batch, tokens, heads)
        self.q, self.v = self.randn(*shape, dim), self.randn(*shape, dim)
        self.k = torch.nn.functional.normalize(self.randn(*shape, dim), dim=-1)
        self.gates = [self.gate(*shape, gates, high=high) for high in (forget, 1.0, 0.1)]
        if dtype != torch.float32:
            self.q, self.k, self.v = (x.to(dtype).double() for x in (self.q, self.k, self.v))
        sizes = [(dim, hidden), (hidden, dim)][-depth:]
        n = self.call.n

        def matrices(scale: float) -> list[Tensor]:
            return [scale * self.randn(n, a, b) / a**0.5 for a, b in sizes]

        self.towards = matrices(1.0) if to_initial else None
        self.initial = [torch.cat(x, 1) for x in zip(matrices(0.0 if to_initial else 1.0), matrices(0.3), strict=True)]
        self.start = [torch.cat(x, 1) for x in zip(matrices(1.0), matrices(0.3), strict=True)]
        self.given_anchor = matrices(1.0)  # as V
        self.reset = (
            self.flags(batch, self.call.chunks) if resets else torch.zeros(batch, self.call.chunks, dtype=torch.bool)
        )
        self.reset[:, 0] &= offset == 0
        self.network = Network.of(options, [x[:, : x.shape[1] // 2] for x in self.start], WHOLE)
        self.tiles = self._walk()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, **FLOAT64)

    def flags(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < 0.5

    def gate(self, *shape: int, high: float) -> Tensor:
        """Exact zeros and ones among others."""
        x = torch.rand(*shape, generator=self.generator, **FLOAT64)
        kind = torch.randint(0, 8, shape, generator=self.generator)
        return high * torch.where(kind == 0, 0.0, torch.where(kind == 1, 1.0, x)).double()

    @property
    def whole(self) -> Group:
        return Group(self.tiles[0].index, self.tiles[-1].index + 1)

    def rows_that_start(self, chunk: int) -> Tensor:
        return self.reset[:, chunk, None].expand(-1, self.call.heads).reshape(-1, 1, 1)

    def _walk(self) -> list[TileTwin]:
        call, found = self.call, []
        state = [x.clone() for x in self.start]
        anchor = self._weights(self.given_anchor)
        for i in range(call.offset // call.tile, -(-(call.tokens + call.offset) // call.tile)):
            start, chunk = i * call.tile - call.offset, i * call.tile // call.chunk
            here = slice(max(start, 0), min(start + call.tile, call.tokens))
            opens = i * call.tile % call.chunk == 0 and start >= 0
            if opens:
                state = [
                    torch.where(self.rows_that_start(chunk), a, b) for a, b in zip(self.initial, state, strict=True)
                ]
                anchor = self._weights([x.chunk(2, 1)[0] for x in state])
            gradient = inner_gradient(heads(self.k)[:, here], heads(self.v)[:, here], anchor, self.network)
            tables = decay_tables(*(heads(g)[:, None, here].mT for g in self.gates)).of_tile(0, call.depth)
            tile = Tile(tables, state, gradient, self.towards)
            found.append(TileTwin(i, opens, chunk, slice(here.start - start, here.stop - start), here, tile, anchor))
            state = [torch.empty_like(x) for x in state]
            write(tile, state)
        return found

    def _weights(self, values: list[Tensor]) -> list[Tensor]:
        return (
            [v.clone() for v in values]
            if self.towards is None
            else [v + t for v, t in zip(values, self.towards, strict=True)]
        )

    # What the kernels are given.

    def tokens(self) -> Tokens:
        qkv = (x.to(self.call.dtype).contiguous() for x in (self.q, self.k, self.v))
        return Tokens(*qkv, *(g.float() for g in self.gates))

    def of(self, group: Group) -> list[TileTwin]:
        return [t for t in self.tiles if group.first <= t.index < group.stop]

    def tables(self, group: Group) -> Tables:
        """With numbers where there are no tokens."""
        found = Tables.empty(self.call, group, torch.device("cpu"))
        for x in found:
            x.fill_(3.0)
        for at, twin in enumerate(self.of(group)):
            for gate in range(self.call.gates):
                t = twin.tile.tables[gate]
                found.G[:, gate, at, twin.rows, twin.rows] = t.G.float()
                found.read[:, gate, at, twin.rows] = t.read.float()
                found.last[:, gate, at, twin.rows] = t.last.float()
                found.carry[:, gate, at, :3] = t.carry.float()
        return found

    def given(self, group: Group) -> Given:
        call = self.call
        states = Matrices.empty(call, 1 + group.tiles, dtype=call.dtype, device=torch.device("cpu"))
        pairs = list(zip(states[-2 * call.depth :: 2], states[-2 * call.depth + 1 :: 2], strict=True))
        for layer, (v, s) in enumerate(pairs):
            v[:, 0] = self.given_anchor[layer].to(call.dtype)
            for at, twin in enumerate(self.of(group)):
                v[:, 1 + at], s[:, 1 + at] = (x.to(call.dtype) for x in twin.tile.state[layer].chunk(2, 1))
        towards = [x.to(call.dtype) for x in self.towards] if self.towards else [v[:, 0] for v, _ in pairs]
        e, n = (torch.empty(call.n, call.tokens, call.dim, dtype=call.dtype) for _ in range(2))
        rstd = torch.empty(call.n, call.tokens)
        for twin in self.tiles:
            gradient = twin.tile.gradient
            e[:, twin.positions] = gradient.deltas[-1].to(call.dtype)
            if gradient.norm:
                n[:, twin.positions], rstd[:, twin.positions] = (
                    gradient.norm[0].to(call.dtype),
                    gradient.norm[2][..., 0].float(),
                )
        return Given(states, (towards[0], towards[-1]), e, n, rstd, self.reset)


def heads(x: Tensor) -> Tensor:
    """[B, T, H, n] -> [B H, T, n]."""
    return x.transpose(1, 2).flatten(0, 1)


def assert_close(actual: Tensor, expected: Tensor, tol: float, name: str) -> None:
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-3)
    assert error < tol, f"{name}: relative error {error:.2e}"
