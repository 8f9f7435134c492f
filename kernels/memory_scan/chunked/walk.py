"""The walk over a call's spans and tiles, forward, in the layout of the tile functions (tiles.py)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunked.network import Network, output
from titans_pretrain.kernels.memory_scan.chunked.spans import Span
from titans_pretrain.kernels.memory_scan.chunked.tables import Tables
from titans_pretrain.kernels.memory_scan.chunked.tiles import Matrices, Tile, TileFunctions


@dataclass(frozen=True)
class States:
    """The states that a call is given, each a tuple over the memory layers of [B, H, d_in, d_out]. Also their gradients."""

    weights: tuple[Tensor, ...]
    surprise: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...] | None  # of a chunk that is half read
    initial_weights: tuple[Tensor, ...] | None  # where documents start, and what is forgotten towards
    initial_surprise: tuple[Tensor, ...] | None

    def flat(self) -> list[Tensor]:
        return [x for xs in vars(self).values() for x in xs or ()]

    def like(self, flat) -> "States":
        """The same fields, from as many tensors in the order of `flat`."""
        waiting = iter(flat)
        return States(*(None if xs is None else tuple(next(waiting) for _ in xs) for xs in vars(self).values()))


@dataclass
class SpanTokens:
    """A span's tokens q, k, v [BH, tokens, D], and its gates' tables for each group of equal tiles; in the state's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: list[Tables]


@dataclass
class SpanSums:
    """z_L of a span where it was summed over ranks: kept, the backward pass need not sum it again."""

    keys: Tensor  # [BH, tokens, D]
    reads: Tensor  # likewise


class Walk:
    """One call: its tokens and states, and how a span is walked through. tokens: q, k, v, forget, momentum, lr."""

    def __init__(
        self, tokens: list[Tensor], states: States, reset: Tensor | None, network: Network, to_initial: bool,
        functions: TileFunctions,
    ):  # fmt: skip
        self.tokens, self.network, self.functions = tokens, network, functions
        self.dtype = states.weights[0].dtype
        self.depth = len(states.weights)
        self.reset = reset  # [B, chunks]
        self.towards = [x.contiguous() for x in _merge_heads(states.initial_weights)] if to_initial else None
        self.start = self.join(_merge_heads(states.weights), _merge_heads(states.surprise))
        self.anchor = None if states.anchor is None else _merge_heads(states.anchor)
        self.initial = None
        if states.initial_weights is not None:
            self.initial = self.join(_merge_heads(states.initial_weights), _merge_heads(states.initial_surprise))
        self.buffers: list[Matrices] = []  # one span's states, used again by the next: fresh memory is slow

    def join(self, weights: Matrices, surprise: Matrices) -> Matrices:
        """A state as the tile functions have it: the two slots in one matrix, always a copy."""
        if self.towards is not None:
            weights = [w - t for w, t in zip(weights, self.towards, strict=True)]
        return [torch.cat(slots, 1) for slots in zip(weights, surprise, strict=True)]

    def weights(self, state: Matrices) -> Matrices:
        """W of a joined state, always a copy."""
        values, _ = split_slots(state)
        if self.towards is None:
            return [v.clone() for v in values]
        return [v + t for v, t in zip(values, self.towards, strict=True)]

    def rows_that_start(self, chunk: int) -> Tensor | None:
        """Where a document starts at this chunk, [BH, 1, 1]; None: nowhere in the call."""
        if self.reset is None:
            return None
        heads = self.tokens[0].shape[2]
        return self.reset[:, chunk, None].expand(-1, heads).reshape(-1, 1, 1)

    def open_chunk(self, chunk: int, state: Matrices) -> Matrices:
        """Resets the rows whose document starts here, in place; returns the chunk's anchor."""
        row = self.rows_that_start(chunk)
        if row is not None:
            for x, initial in zip(state, self.initial, strict=True):
                torch.where(row, initial, x, out=x)
        return self.weights(state)

    def cut(self, span: Span) -> SpanTokens:
        q, k, v, *gates = (rows(span, x).to(self.dtype) for x in self.tokens)
        groups = zip(*(span.groups(g) for g in gates), strict=True)
        tables = [self.functions.tables(*(g.mT.contiguous() for g in group)) for group in groups]
        return SpanTokens(q.contiguous(), k.contiguous(), v.contiguous(), tables)

    def forward(
        self, span: Span, state: Matrices, anchor: Matrices | None, y: Tensor
    ) -> tuple[Matrices, SpanSums | None]:
        """Moves `state` over the span in place and fills y [B, T, H, D]; returns the anchor, and what the ranks summed."""
        x = self.cut(span)
        z = torch.empty_like(x.q)
        sums = SpanSums(torch.empty_like(x.k), z) if self.network.split.ranks > 1 else None
        for place in span.tiles:
            here = slice(place.start, place.stop)
            if place.opens_chunk:
                anchor = self.open_chunk(place.chunk, state)
            gradient = self.functions.inner_gradient(x.k[:, here], x.v[:, here], anchor, self.network)
            tile = Tile(x.tables[place.group].of_tile(place.index, self.depth), state, gradient, self.towards)
            z[:, here] = self.functions.read(x.q[:, here], tile)
            self.functions.write(tile, state)
            if sums is not None:
                sums.keys[:, here] = gradient.out
        self.network.split.sum(z)
        y[:, span.start : span.stop] = tokens(output(z, x.q, self.network.residual_norm), len(y))
        return anchor, sums

    def again(
        self, span: Span, x: SpanTokens, state: Matrices, anchor: Matrices | None, sums: SpanSums | None
    ) -> list[tuple[Tile, Matrices]]:
        """The tiles of a span and their anchors, each with the state before it, from the state and the anchor that enter the
        span. Valid until the next span."""
        found = []
        places = span.tiles
        for i, place in enumerate(places):
            here = slice(place.start, place.stop)
            if place.opens_chunk:
                anchor = self.open_chunk(place.chunk, state)
            known = None if sums is None else sums.keys[:, here]
            gradient = self.functions.inner_gradient(x.k[:, here], x.v[:, here], anchor, self.network, known)
            tile = Tile(x.tables[place.group].of_tile(place.index, self.depth), state, gradient, self.towards)
            found.append((tile, anchor))
            if i < len(places) - 1:
                if i == len(self.buffers):
                    self.buffers.append([torch.empty_like(s) for s in state])
                self.functions.write(tile, self.buffers[i])
                state = self.buffers[i]
        return found


def split_slots(state: Matrices) -> tuple[Matrices, Matrices]:
    """The two slots of a joined state, views."""
    first, second = zip(*(x.chunk(2, 1) for x in state), strict=True)
    return list(first), list(second)


def rows(span: Span, x: Tensor) -> Tensor:
    """[B, T, H, .] -> [BH, tokens, .] of the span."""
    return x[:, span.start : span.stop].transpose(1, 2).flatten(0, 1)


def tokens(x: Tensor, batch: int) -> Tensor:
    """[BH, tokens, .] -> [B, tokens, H, .]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _merge_heads(xs: tuple[Tensor, ...]) -> Matrices:
    return [x.flatten(0, 1) for x in xs]
