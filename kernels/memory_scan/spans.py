"""Cutting a sequence into spans of equal tiles.

The gradient chunk (C, part of the function) and the tile (a matter of cost) are independent: inside a chunk the gradients are
fixed and the two-state recurrence is linear, so it may be cut anywhere. A span is a run of equal tiles;
the state is saved at its start and recomputed inside it.
"""

import math
from dataclasses import dataclass

MAX_TILE, MIN_TILE = 64, 16
MAX_CHUNKS = 32  # per span by default: beyond it a span only leaves the caches


@dataclass(frozen=True)
class Span:
    start: int  # first token
    tile: int  # tokens per tile
    tiles: int
    tiles_per_chunk: int
    opens_chunk: bool  # False: continues a chunk whose anchor an earlier span (or call) set
    chunk: int  # index of its first chunk in this call

    @property
    def stop(self) -> int:
        return self.start + self.tile * self.tiles

    def opens(self, tile: int) -> bool:
        """Does this tile start a chunk?"""
        return self.opens_chunk and tile % self.tiles_per_chunk == 0

    def chunk_of(self, tile: int) -> int:
        return self.chunk + tile // self.tiles_per_chunk


def tile_size(chunk_size: int) -> int:
    """The largest divisor of the chunk up to MAX_TILE; a chunk without one above MIN_TILE is one tile."""
    return next((b for b in range(min(chunk_size, MAX_TILE), MIN_TILE - 1, -1) if chunk_size % b == 0), chunk_size)


def cut(tokens: int, chunk_size: int, offset: int, checkpoint_every: int | None) -> list[Span]:
    """Spans of a call of `tokens` tokens whose first chunk has `offset` tokens behind it."""
    tile = tile_size(chunk_size)
    spans: list[Span] = []
    start = 0

    def partial(length: int, opens: bool, chunk: int) -> None:
        nonlocal start
        whole, rest = divmod(length, tile)
        if whole:
            spans.append(Span(start, tile, whole, whole, opens, chunk))
            start = spans[-1].stop
        if rest:
            spans.append(Span(start, rest, 1, 1, opens and not whole, chunk))
            start = spans[-1].stop

    chunk = 0
    if offset:
        partial(min(tokens, chunk_size - offset), False, 0)
        chunk = 1
    whole = (tokens - start) // chunk_size
    every = checkpoint_every or min(MAX_CHUNKS, max(1, math.ceil(math.sqrt(whole))))
    per_chunk = chunk_size // tile
    for first in range(0, whole, every):
        chunks = min(every, whole - first)
        spans.append(Span(start, tile, chunks * per_chunk, per_chunk, True, chunk + first))
        start = spans[-1].stop
    if start < tokens:
        partial(tokens - start, True, chunk + whole)
    return spans
