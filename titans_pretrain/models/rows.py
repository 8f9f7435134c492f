"""Rows of a batch that have read different numbers of tokens, in one state: what a row has fewer of stands on the right, behind
zeros that it does not see. Such a state is *ragged* and takes one token at a time; what a row computes is what it would alone."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from titans_pretrain.kernels.memory_scan import MemoryState, StepHistory
from titans_pretrain.models.state import LayerState, MemoryLayerState, ModelState, SegmentState

Pair = tuple[Tensor, Tensor] | None


def stack_rows(states: Sequence[ModelState]) -> ModelState:
    """One state of the rows of all of `states`, none of which ends in padding."""
    if any(state.ragged for state in states):
        states = [row for state in states for row in rows_of(state)]
    batches = [len(state.position) for state in states]
    layers = tuple(_layer(layers, batches) for layers in zip(*(state.layers for state in states), strict=True))
    return ModelState(layers, torch.cat([state.position for state in states]), ragged=True)


def rows_of(state: ModelState) -> list[ModelState]:
    """Each row by itself, as it was before `stack_rows`."""
    rows = []
    for i, position in enumerate(state.position.tolist()):
        row = state.select(torch.tensor([i]))
        if state.ragged:
            layers = tuple(_own(layer, position) for layer in row.layers)
            row = ModelState(layers, row.position)
        rows.append(row)
    return rows


def _layer(layers: Sequence[LayerState], batches: Sequence[int]) -> LayerState:
    memory = None if layers[0].memory is None else _memory([layer.memory for layer in layers], batches)
    # where all rows are at a segment's start they go on together
    segment = None if all(layer.segment is None for layer in layers) else _segment(layers, batches)
    return LayerState(memory, _on_the_right([layer.kv for layer in layers], batches), segment)


def _memory(layers: Sequence[MemoryLayerState], batches: Sequence[int]) -> MemoryLayerState:
    states = [layer.memory for layer in layers]
    weights, surprise, anchor = (
        tuple(torch.cat(parts) for parts in zip(*(get(state) for state in states), strict=True))
        for get in (lambda s: s.weights, lambda s: s.surprise, lambda s: s.anchor or s.weights)
    )
    device = weights[0].device
    offset = torch.cat([torch.full((n,), s.offset, device=device) for s, n in zip(states, batches, strict=True)])
    conv = tuple(torch.cat(tails) for tails in zip(*(layer.conv for layer in layers), strict=True))
    pairs = [layer.history and (layer.history.keys, layer.history.steps) for layer in layers]
    history = _on_the_right(pairs, batches)
    memory = MemoryState(weights, surprise, anchor, offset)
    return MemoryLayerState(memory, conv, history and StepHistory(*history), layers[0].initial)


def _segment(layers: Sequence[LayerState], batches: Sequence[int]) -> SegmentState:
    """Of half-read segments, None at a segment's start."""
    segments = [layer.segment or SegmentState(layer.memory.memory.weights, None, None) for layer in layers]
    counts = [0 if s.kv is None else s.kv[0].shape[1] for s in segments]
    weights = tuple(torch.cat(parts) for parts in zip(*(s.weights for s in segments), strict=True))
    read = torch.cat([torch.full((b,), n, device=weights[0].device) for b, n in zip(batches, counts, strict=True)])
    kv, retrieved = (
        _on_the_right(pairs, batches) for pairs in zip(*((s.kv, s.retrieved) for s in segments), strict=True)
    )
    return SegmentState(weights, kv, retrieved, read)


def _on_the_right(pairs: Sequence[Pair], batches: Sequence[int]) -> Pair:
    """Pairs of [B, n, ...] with n of their own, None for n = 0, as one pair over all rows, zeros before what is shorter."""
    given = [pair for pair in pairs if pair is not None]
    if not given:
        return None
    most = max(pair[0].shape[1] for pair in given)

    def grow(pair: Pair, batch: int, i: int) -> Tensor:
        if pair is None:
            return given[0][i].new_zeros(batch, most, *given[0][i].shape[2:])
        return pad(pair[i], (0, 0) * (pair[i].dim() - 2) + (most - pair[i].shape[1], 0))

    first, second = (torch.cat([grow(pair, n, i) for pair, n in zip(pairs, batches, strict=True)]) for i in range(2))
    return first, second


def _own(layer: LayerState, position: int) -> LayerState:
    """A single row's layer out of a ragged state."""
    memory, segment = layer.memory, layer.segment
    if memory is not None:
        state, offset = memory.memory, int(memory.memory.offset)
        state = replace(state, anchor=state.anchor if offset else None, offset=offset)
        history = memory.history and _last((memory.history.keys, memory.history.steps), offset)
        memory = replace(memory, memory=state, history=history and StepHistory(*history))
    if segment is not None and segment.read is not None:
        read = int(segment.read)
        segment = (
            SegmentState(segment.weights, _last(segment.kv, read), _last(segment.retrieved, read)) if read else None
        )
    return LayerState(memory, layer.kv and _last(layer.kv, position, keep_empty=True), segment)


def _last(pair: Pair, count: int, keep_empty: bool = False) -> Pair:
    """The last `count` tokens of each, if there are so many."""
    if pair is None or not (count or keep_empty):
        return None
    first, second = (x[:, max(x.shape[1] - count, 0) :] for x in pair)
    return first, second
