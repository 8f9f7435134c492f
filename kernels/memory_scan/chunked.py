"""The dual form in torch, any device: exact, linear in T, with a hand-written backward pass.

States are saved at span starts only (spans.py) and recomputed inside a span in the backward pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_pretrain.kernels.memory_scan.chunk_backward import StateGradients, tile_backward
from titans_pretrain.kernels.memory_scan.chunk_forward import Matrices, SpanInputs, read, span_rows, tile_tables, write
from titans_pretrain.kernels.memory_scan.gates import TableGradients, decay_tables_backward
from titans_pretrain.kernels.memory_scan.hidden_split import HiddenGroup, sum_over_ranks, sum_together
from titans_pretrain.kernels.memory_scan.network import damping_eps, inner_gradient, output
from titans_pretrain.kernels.memory_scan.spans import Span, cut
from titans_pretrain.kernels.memory_scan.state import MemoryState


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor,
    momentum: Tensor,
    lr: Tensor,
    state: MemoryState,
    *,
    chunk_size: int,
    residual_norm: bool,
    damping: float,
    forget_to: str,
    reset: Tensor | None,
    initial_state: MemoryState | None,
    checkpoint_every: int | None,
    hidden_group: HiddenGroup,
) -> tuple[Tensor, MemoryState]:
    """See memory_scan; arguments are validated there."""
    depth = state.depth
    tokens = q.shape[1]
    offset = (state.offset + tokens) % chunk_size
    states = [*state.weights, *state.surprise]
    if state.offset:
        states += state.anchor
    if initial_state is not None:
        states += [*initial_state.weights, *initial_state.surprise]
    spans = cut(tokens, chunk_size, state.offset, checkpoint_every)
    y, *out = _Scan.apply(
        q, k, v, forget, momentum, lr, reset, spans, residual_norm, damping, forget_to == "initial",
        bool(state.offset), bool(offset), depth, hidden_group, *states,
    )  # fmt: skip
    anchor = tuple(out[2 * depth :]) if offset else None
    return y, MemoryState(tuple(out[:depth]), tuple(out[depth : 2 * depth]), anchor, offset)


@dataclass
class SpanSums:
    """z_L of a span, summed over a hidden_group: kept, the backward pass need not sum it again."""

    keys: list[Tensor]  # per tile [N, b, D]
    reads: Tensor  # [N, G, b, D]


class _Walk:
    """One scan in the layout of the tile functions: walks spans forward, and back from their first states."""

    def __init__(
        self, tokens, reset, residual_norm, damping, forget_to_initial, half_read, depth, hidden_group, states
    ):
        self.tokens, self.residual_norm, self.hidden_group = tokens, residual_norm, hidden_group
        self.dtype = states[0].dtype
        self.eps = damping_eps(damping, states[depth - 1], hidden_group)
        matrices = [s.flatten(0, 1) for s in states]
        groups = [matrices[i : i + depth] for i in range(0, len(matrices), depth)]
        self.anchor = groups[2] if half_read else None
        initial = groups[2 + half_read :]
        self.towards = [w.contiguous() for w in initial[0]] if forget_to_initial else None
        self.state = self.join(*groups[:2])
        self.initial = self.join(*initial) if initial else None
        self.reset = None if reset is None else reset.repeat_interleave(tokens[0].shape[2], 0)
        self.buffers: list[Matrices] = []  # one span's states, used again by the next: fresh memory is slow

    def join(self, weights: Matrices, surprise: Matrices) -> Matrices:
        """The slots of a state, stacked (chunk_forward.py); always a copy."""
        towards = self.towards or [0.0] * len(weights)
        return [torch.cat((w - t, s), 1) for w, s, t in zip(weights, surprise, towards, strict=True)]

    def weights(self, state: Matrices) -> Matrices:
        towards = self.towards or [0.0] * len(state)
        return [x.chunk(2, 1)[0] + t for x, t in zip(state, towards, strict=True)]

    def open_chunk(self, span: Span, tile: int, state: Matrices) -> Matrices:
        """Resets the rows whose document starts here, in place; returns the anchor."""
        if self.reset is not None:
            row = self.reset[:, span.chunk_of(tile)].view(-1, 1, 1)
            for x, initial in zip(state, self.initial, strict=True):
                torch.where(row, initial, x, out=x)
        return self.weights(state)

    def forward(
        self, span: Span, state: Matrices, anchor: Matrices | None, y: Tensor
    ) -> tuple[Matrices, SpanSums | None]:
        """Moves `state` over the span in place and fills y [B, T, H, D]; returns the anchor, and what the ranks summed."""
        x = SpanInputs.cut(span, *self.tokens, self.dtype)
        tables = x.tables()
        z = torch.empty_like(x.q)
        sums = None if self.hidden_group is None else SpanSums([], z)
        for tile in range(span.tiles):
            if span.opens(tile):
                anchor = self.open_chunk(span, tile, state)
            t = tile_tables(tables, tile, len(state))
            gradient = inner_gradient(
                x.k[:, tile], x.v[:, tile], anchor, self.residual_norm, self.eps, self.hidden_group
            )
            z[:, tile] = read(x.q[:, tile], t, state, gradient, self.towards)[-1][1]
            write(t, state, gradient, state)
            if sums is not None:
                sums.keys.append(gradient.out)
        sum_over_ranks(z, self.hidden_group)
        y[:, span.start : span.stop] = _tokens(output(z, x.q, self.residual_norm), len(y))
        return anchor, sums

    def backward(
        self, span: Span, state: Matrices, anchor: Matrices | None, sums: SpanSums | None, d_y: Tensor, d: "_Gradients"
    ) -> None:
        """state, anchor: those that entered the span. d: gradients after the span, on return those before it."""
        x = SpanInputs.cut(span, *self.tokens, self.dtype)
        tables = x.tables()
        d_tables = TableGradients.zeros(tables)
        d_rows = span_rows(span, d_y).to(self.dtype).contiguous()
        kept = []
        for tile in range(span.tiles):  # the states again, each kept this time
            if span.opens(tile):
                anchor = self.open_chunk(span, tile, state)
            t = tile_tables(tables, tile, len(state))
            known = None if sums is None else sums.keys[tile]
            gradient = inner_gradient(
                x.k[:, tile], x.v[:, tile], anchor, self.residual_norm, self.eps, self.hidden_group, known
            )
            kept.append((t, state, anchor, gradient))
            if tile < span.tiles - 1:
                if tile == len(self.buffers):
                    self.buffers.append([torch.empty_like(s) for s in state])
                write(t, state, gradient, self.buffers[tile])
                state = self.buffers[tile]
        d_q, d_k, d_v = (torch.empty_like(x.q) for _ in range(3))
        for tile in reversed(range(span.tiles)):
            t, state, anchor, gradient = kept.pop()
            d_q[:, tile], d_k[:, tile], d_v[:, tile] = tile_backward(
                d_rows[:, tile], x.q[:, tile], t, state, anchor, gradient, self.towards,
                tile_tables(d_tables, tile, len(state)), d.walk, self.residual_norm,
                self.eps, self.hidden_group, None if sums is None else sums.reads[:, tile],
            )  # fmt: skip
            if span.opens(tile):
                d.close_chunk(None if self.reset is None else self.reset[:, span.chunk_of(tile)])
        gates = decay_tables_backward(tables, d_tables)
        d_q, d_k, *gates = sum_together([d_q, d_k, *gates], self.hidden_group)
        if self.residual_norm:  # the x of x + LN(z), of which each rank has the whole
            d_q += d_rows
            d_k -= d_v
        for total, part in zip(d.tokens, (d_q, d_k, d_v, *(g.mT for g in gates)), strict=True):
            total[:, span.start : span.stop] = _tokens(part, len(d_y))


class _Gradients:
    """What the backward walk collects."""

    def __init__(self, walk: _Walk, d_weights: Matrices, d_surprise: Matrices, d_anchor: Matrices | None):
        zeros_like = torch.zeros_like
        self.tokens = [torch.empty_like(t) for t in walk.tokens]
        self.initial = None if walk.initial is None else [zeros_like(x) for x in walk.initial]
        # the output weights are V + W_init
        towards = None if walk.towards is None else [w.clone() for w in d_weights]
        state = [torch.cat(slots, 1) for slots in zip(d_weights, d_surprise, strict=True)]
        self.walk = StateGradients(state, d_anchor, towards)

    def close_chunk(self, reset: Tensor | None) -> None:
        """At a chunk's first tile: the anchor was V + W_init, and where a document starts the state was the initial one."""
        walk = self.walk
        for layer, anchor in enumerate(walk.anchor):
            walk.state[layer][:, : anchor.shape[1]] += anchor
            if walk.towards is not None:
                walk.towards[layer] += anchor
            if reset is not None:
                row = reset.view(-1, 1, 1)
                self.initial[layer] += walk.state[layer] * row
                walk.state[layer].masked_fill_(row, 0)
        walk.anchor = None

    def states(self, half_read: bool) -> Matrices:
        """In the order of the scan's state arguments."""
        walk = self.walk
        d_weights, d_surprise = _split(walk.state)
        found = [*d_weights, *d_surprise, *(walk.anchor if half_read else ())]
        if self.initial is not None:
            d_initial, d_initial_surprise = _split(self.initial)
            if walk.towards is not None:  # V = W - W_init at the start; the initial state's V is zero for any W_init
                d_initial = [t - w for t, w in zip(walk.towards, d_weights, strict=True)]
            found += [*d_initial, *d_initial_surprise]
        return found


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        forget,
        momentum,
        lr,
        reset,
        spans,
        residual_norm,
        damping,
        to_initial,
        half_read,
        leaves_half,
        depth,
        hidden_group,
        *states,
    ):
        tokens, config = (
            (q, k, v, forget, momentum, lr),
            (residual_norm, damping, to_initial, half_read, depth, hidden_group),
        )
        walk = _Walk(tokens, reset, *config, states)
        y = torch.empty_like(q, memory_format=torch.contiguous_format)
        state, anchor, saved = walk.state, walk.anchor, []
        for span in spans:
            before = ([x.clone() for x in state], anchor) if any(ctx.needs_input_grad) else None
            anchor, sums = walk.forward(span, state, anchor, y)
            if before is not None:
                saved.append((*before, sums))
        ctx.save_for_backward(*tokens, reset, *states)
        ctx.config, ctx.spans, ctx.saved, ctx.leaves_half = config, spans, saved, leaves_half
        out = [*walk.weights(state), *(x.chunk(2, 1)[1] for x in state), *(anchor if leaves_half else ())]
        return (y, *(x.unflatten(0, (len(q), -1)).clone() for x in out))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, *d_states):
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks only once
        (*tokens, reset), states = saved[:7], saved[7:]
        *_, half_read, depth, _ = ctx.config
        with torch.autocast(d_y.device.type, enabled=False):
            walk = _Walk(tokens, reset, *ctx.config, states)
            d_out = [d.to(walk.dtype).flatten(0, 1) for d in d_states]
            d_anchor = [x.clone() for x in d_out[2 * depth :]] if ctx.leaves_half else None
            d = _Gradients(walk, d_out[:depth], d_out[depth : 2 * depth], d_anchor)
            for span, (state, anchor, sums) in zip(reversed(ctx.spans), reversed(ctx.saved), strict=True):
                walk.backward(span, [x.clone() for x in state], anchor, sums, d_y, d)
        return (*d.tokens, *[None] * 9, *(x.unflatten(0, (len(d_y), -1)) for x in d.states(half_read)))


def _split(state: Matrices) -> tuple[Matrices, Matrices]:
    first, second = zip(*(x.chunk(2, 1) for x in state), strict=True)
    return list(first), list(second)


def _tokens(x: Tensor, batch: int) -> Tensor:
    """[N, G, b, .] -> [B, G * b, H, .]."""
    return x.unflatten(0, (batch, -1)).permute(0, 2, 3, 1, 4).flatten(1, 2)
