"""The walk over a call's spans, backward: every span's states once more, then its tiles in reverse."""

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunked.spans import Span
from titans_pretrain.kernels.memory_scan.chunked.tables import TableGradients
from titans_pretrain.kernels.memory_scan.chunked.tiles import Matrices, StateGradients
from titans_pretrain.kernels.memory_scan.chunked.walk import SpanSums, States, Walk, rows, split_slots, tokens


class WalkBack:
    """Gradients of one call, from those of y [B, T, H, D] and of the final weights, surprise and anchor, [BH, d_in, d_out] each.

    tokens: gradients of the walk's tokens, filled span by span
    """

    def __init__(self, walk: Walk, d_y: Tensor, d_weights: Matrices, d_surprise: Matrices, d_anchor: Matrices | None):
        self.walk, self.d_y = walk, d_y
        self.tokens = [torch.empty_like(x) for x in walk.tokens]
        joined = [torch.cat(slots, 1) for slots in zip(d_weights, d_surprise, strict=True)]
        towards = None if walk.towards is None else [d.clone() for d in d_weights]  # W is V + W_init
        self._carried = StateGradients(joined, d_anchor, towards)
        self._initial = None if walk.initial is None else [torch.zeros_like(x) for x in walk.initial]

    def span(self, span: Span, state: Matrices, anchor: Matrices | None, sums: SpanSums | None) -> None:
        """Goes back over a span. state (overwritten) and anchor: those that entered it."""
        walk, carried = self.walk, self._carried
        x = walk.cut(span)
        d_rows = rows(span, self.d_y).to(walk.dtype).contiguous()
        d_tables = [TableGradients.zeros(t) for t in x.tables]
        d_q, d_k, d_v = (torch.empty_like(x.q) for _ in range(3))
        tiles = walk.again(span, x, state, anchor, sums)
        for place in reversed(span.tiles):
            tile, anchor = tiles.pop()
            here = slice(place.start, place.stop)
            d_q[:, here], d_k[:, here], d_v[:, here] = walk.functions.backward(
                d_rows[:, here], x.q[:, here], None if sums is None else sums.reads[:, here], tile, anchor, walk.network,
                d_tables[place.group].of_tile(place.index, walk.depth), carried,
            )  # fmt: skip
            if place.opens_chunk:
                self._close_chunk(place.chunk)
        groups = [walk.functions.tables_backward(t, d) for t, d in zip(x.tables, d_tables, strict=True)]
        gates = [span.ungroup([g.mT for g in of_gate]) for of_gate in zip(*groups, strict=True)]
        d_q, d_k, *gates = walk.network.split.sum_together([d_q, d_k, *gates])
        if walk.network.residual_norm:  # the x of x + LN(z), of which each rank has the whole
            d_q += d_rows
            d_k -= d_v
        for total, part in zip(self.tokens, (d_q, d_k, d_v, *gates), strict=True):
            total[:, span.start : span.stop] = tokens(part, len(total))

    def _close_chunk(self, chunk: int) -> None:
        """At a chunk's first tile: the anchor was V + W_init, and where a document starts the state was the initial one."""
        carried = self._carried
        row = self.walk.rows_that_start(chunk)
        for layer, anchor in enumerate(carried.anchor):
            carried.state[layer][:, : anchor.shape[1]] += anchor
            if carried.towards is not None:
                carried.towards[layer] += anchor
            if row is not None:
                self._initial[layer] += carried.state[layer] * row
                carried.state[layer].masked_fill_(row, 0)
        carried.anchor = None

    def states(self, half_read: bool) -> States:
        """Gradients of the states that the call was given, [BH, d_in, d_out]; call it after all spans."""
        carried = self._carried
        d_weights, d_surprise = split_slots(carried.state)
        d_initial = d_initial_surprise = None
        if self._initial is not None:
            d_initial, d_initial_surprise = split_slots(self._initial)
            if carried.towards is not None:  # V = W - W_init at the start; the initial state's V is zero for any W_init
                d_initial = [t - w for t, w in zip(carried.towards, d_weights, strict=True)]
        return States(d_weights, d_surprise, carried.anchor if half_read else None, d_initial, d_initial_surprise)
