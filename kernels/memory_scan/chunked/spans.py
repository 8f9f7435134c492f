"""Cutting a call into spans of tiles.

The gradient chunk (C, part of the function) and the tile (a matter of cost) are independent: inside a chunk the gradients are
fixed and the two-state recurrence is linear, so it may be cut anywhere. A stretch is a chunk or a part of one, cut into tiles; a
span is a run of equal stretches. The state is saved at a span's start and recomputed inside it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TILE = 64  # tokens; a tile's cost per token grows with it
MAX_TILES = 32  # per span by default: beyond it a span only leaves the caches


@dataclass(frozen=True)
class Tile:
    start: int  # first token, counted from the span's first
    stop: int
    group: int  # 0 for tiles of the usual length, 1 for the shorter last ones of the stretches (if all are short: 0)
    index: int  # in the group
    opens_chunk: bool
    chunk: int  # that it belongs to, counted from the call's first


@dataclass(frozen=True)
class Span:
    start: int  # first token
    length: int  # tokens of a stretch
    stretches: int
    tile: int  # tokens of its tiles, but for the last
    opens_chunk: bool  # every stretch opens a chunk; False: the only one continues a chunk
    chunk: int  # that the first stretch belongs to, counted from the call's first
    opened_by: int | None  # index of the span that opened the chunk that this one continues; None: an earlier call

    @property
    def stop(self) -> int:
        return self.start + self.length * self.stretches

    @property
    def tiles(self) -> list[Tile]:
        found = []
        whole, rest = divmod(self.length, self.tile)
        for i in range(self.stretches):
            first = i * self.length
            for j in range(whole + bool(rest)):
                start = first + j * self.tile
                short = j == whole
                group, index = (bool(whole), i) if short else (0, i * whole + j)
                stop = first + self.length if short else start + self.tile
                found.append(Tile(start, stop, int(group), index, self.opens_chunk and j == 0, self.chunk + i))
        return found

    def groups(self, x: Tensor) -> list[Tensor]:
        """x [BH, tokens of the span, n] by tiles of one length: [BH, tiles, b, n] each."""
        whole, rest = divmod(self.length, self.tile)
        x = x.unflatten(1, (self.stretches, self.length))
        found = []
        if whole:
            found.append(x[:, :, : whole * self.tile].unflatten(2, (whole, self.tile)).flatten(1, 2))
        if rest:
            found.append(x[:, :, whole * self.tile :])
        return found

    def ungroup(self, groups: list[Tensor]) -> Tensor:
        """The inverse of groups."""
        return torch.cat([g.unflatten(1, (self.stretches, -1)).flatten(2, 3) for g in groups], 2).flatten(1, 2)


def tile_size(chunk_size: int) -> int:
    """Tokens per tile: as few tiles as MAX_TILE allows, of one length but for a shorter last one."""
    return math.ceil(chunk_size / math.ceil(chunk_size / MAX_TILE))


def spans_of(tokens: int, chunk_size: int, offset: int, checkpoint_every: int | None) -> list[Span]:
    """Spans of a call of `tokens` tokens whose first chunk has `offset` tokens behind it.

    checkpoint_every: chunks per span; None: so many that a span has about as many tiles as there are spans. A chunk too long
    for one span (MAX_TILES) is cut into several.
    """
    tile = tile_size(chunk_size)
    per_chunk = math.ceil(chunk_size / tile)
    if checkpoint_every is None:
        tiles = min(MAX_TILES, math.ceil(math.sqrt(math.ceil(tokens / tile))))
        chunks = max(1, tiles // per_chunk)
    else:
        tiles, chunks = MAX_TILES, checkpoint_every
    longest = tile * tiles
    spans: list[Span] = []
    opened_by = None
    for start, length, count, chunk in _runs(tokens, chunk_size, offset, chunks if chunk_size <= longest else 1):
        opens = chunk > 0 or offset == 0
        if opens:
            opened_by = len(spans)
        if length <= longest:
            spans.append(Span(start, length, count, tile, opens, chunk, None if opens else opened_by))
            continue
        for first in range(0, length, longest):
            here = opens and first == 0
            part = min(longest, length - first)
            spans.append(Span(start + first, part, 1, tile, here, chunk, None if here else opened_by))
    return spans


def _runs(tokens: int, chunk_size: int, offset: int, chunks: int) -> Iterator[tuple[int, int, int, int]]:
    """(first token, tokens of each, how many, index of the first) of runs of up to `chunks` whole chunks, and of cut ones."""
    start = chunk = 0
    if offset:
        length = min(tokens, chunk_size - offset)
        yield 0, length, 1, 0
        start, chunk = length, 1
    whole = (tokens - start) // chunk_size
    for first in range(0, whole, chunks):
        count = min(chunks, whole - first)
        yield start, chunk_size, count, chunk + first
        start += count * chunk_size
    if start < tokens:
        yield start, tokens - start, 1, chunk + whole
