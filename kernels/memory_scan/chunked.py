"""The dual form in torch, any device: exact, linear in T, with a hand-written backward pass.

States are saved at span starts only (spans.py) and recomputed inside a span in the backward pass.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_pretrain.kernels.memory_scan.chunk_backward import span_backward
from titans_pretrain.kernels.memory_scan.chunk_forward import (
    Matrices,
    SpanInputs,
    Written,
    read,
    span_rows,
    weights,
    write,
)
from titans_pretrain.kernels.memory_scan.gates import Tables
from titans_pretrain.kernels.memory_scan.network import output
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
    forget_to: str,
    reset: Tensor | None,
    initial_state: MemoryState | None,
    checkpoint_every: int | None,
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
        q, k, v, forget, momentum, lr, reset, spans, residual_norm, forget_to == "initial",
        bool(state.offset), bool(offset), depth, *states,
    )  # fmt: skip
    anchor = tuple(out[2 * depth :]) if offset else None
    return y, MemoryState(tuple(out[:depth]), tuple(out[depth : 2 * depth]), anchor, offset)


class _Walk:
    """The arguments of one scan in the span functions' layout, for the forward walk and for the recomputation."""

    def __init__(self, tokens, reset, spans, residual_norm, forget_to_initial, half_read, depth, states):
        self.tokens, self.spans, self.residual_norm = tokens, spans, residual_norm
        self.dtype = states[0].dtype
        self.slots = 3 if forget_to_initial else 2
        matrices = [s.flatten(0, 1) for s in states]
        groups = [matrices[i : i + depth] for i in range(0, len(matrices), depth)]
        self.anchor = groups[2] if half_read else None
        initial = groups[2 + half_read :]
        towards = initial[0] if forget_to_initial else None
        self.state = self.join(*groups[:2], towards)
        self.initial = self.join(*initial, towards) if initial else None
        self.reset = None if reset is None else reset.repeat_interleave(tokens[0].shape[2], 0)

    def write(self, span: Span, state: Matrices, anchor: Matrices | None) -> tuple[SpanInputs, Tables, Written]:
        x = SpanInputs.cut(span, *self.tokens, self.dtype)
        tables = x.tables(self.slots)
        options = dict(residual_norm=self.residual_norm, reset=self.reset, initial=self.initial)
        return x, tables, write(span, x, tables, state, anchor, **options)

    @staticmethod
    def join(weights: Matrices, surprise: Matrices, towards: Matrices | None) -> Matrices:
        """The slots of a state, stacked (chunk_forward.py)."""
        if towards is None:
            return [torch.cat(slots, 1) for slots in zip(weights, surprise, strict=True)]
        return [torch.cat((w - t, s, t), 1) for w, s, t in zip(weights, surprise, towards, strict=True)]

    def join_backward(self, d_state: Matrices) -> tuple[Matrices, Matrices, Matrices | None]:
        """Gradients of weights, surprise and W_init from those of the slots."""
        d_weights, d_surprise, *rest = ([*d] for d in zip(*(d.chunk(self.slots, 1) for d in d_state), strict=True))
        return d_weights, d_surprise, [t - w for t, w in zip(rest[0], d_weights, strict=True)] if rest else None

    def output(self, state: Matrices) -> Matrices:
        """Weights, then surprise, of a state."""
        return [weights(s, self.slots) for s in state] + [s.chunk(self.slots, 1)[1] for s in state]

    def output_backward(self, d_weights: Matrices, d_surprise: Matrices) -> Matrices:
        repeated = (d_weights, d_surprise, d_weights)[: self.slots]
        return [torch.cat(slots, 1) for slots in zip(*repeated, strict=True)]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, forget, momentum, lr, reset, spans, residual_norm, to_initial, half_read, leaves_half, depth, *states):
        tokens = (q, k, v, forget, momentum, lr)
        config = (spans, residual_norm, to_initial, half_read, depth)
        walk = _Walk(tokens, reset, *config, states)
        y = torch.empty_like(q, memory_format=torch.contiguous_format)
        state, anchor, saved = walk.state, walk.anchor, []
        for span in spans:
            saved.append((state, anchor))
            x, tables, written = walk.write(span, state, anchor)
            z = read(x.q, tables, written)[-1][1]
            y[:, span.start : span.stop] = _tokens(output(z, x.q, residual_norm), len(q))
            state, anchor = written.last, written.anchors[-1]
        ctx.save_for_backward(*tokens, reset, *states)
        ctx.config, ctx.saved, ctx.leaves_half = config, saved, leaves_half
        out = [*walk.output(state), *(anchor if leaves_half else ())]
        return (y, *(o.unflatten(0, (len(q), -1)).contiguous() for o in out))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, *d_states):
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks only once
        (*tokens, reset), states = saved[:7], saved[7:]
        spans, *_, half_read, depth = ctx.config
        with torch.autocast(d_y.device.type, enabled=False):
            walk = _Walk(tokens, reset, *ctx.config, states)
            d_out = [d.to(walk.dtype).flatten(0, 1) for d in d_states]
            d_state = walk.output_backward(d_out[:depth], d_out[depth : 2 * depth])
            d_anchor = d_out[2 * depth :] if ctx.leaves_half else None
            d_initial = None if walk.initial is None else [torch.zeros_like(s) for s in walk.initial]
            d_tokens = [torch.empty_like(t) for t in tokens]
            for span, (state, anchor) in zip(reversed(spans), reversed(ctx.saved), strict=True):
                x, tables, written = walk.write(span, state, anchor)
                d_rows = span_rows(span, d_y).to(walk.dtype).contiguous()
                options = dict(residual_norm=walk.residual_norm, reset=walk.reset)
                d = span_backward(span, x, tables, written, d_rows, d_state, d_anchor, **options)
                d_state, d_anchor = d.state, d.anchor
                for total, part in zip(d_initial or (), d.initial or (), strict=d.initial is not None):
                    total += part
                d = d.inputs
                for total, part in zip(d_tokens, (d.q, d.k, d.v, d.forget.mT, d.momentum.mT, d.lr.mT), strict=True):
                    total[:, span.start : span.stop] = _tokens(part, len(d_y))
            d_weights, d_surprise, d_towards = walk.join_backward(d_state)
            d_in = [*d_weights, *d_surprise, *(d_anchor if half_read else ())]
            if d_initial is not None:
                d_weights, d_surprise, through_reset = walk.join_backward(d_initial)
                for d_more in (d_towards, through_reset):
                    d_weights = [w + d for w, d in zip(d_weights, d_more, strict=True)] if d_more else d_weights
                d_in += [*d_weights, *d_surprise]
        return (*d_tokens, *[None] * 7, *(d.unflatten(0, (len(d_y), -1)) for d in d_in))


def _tokens(x: Tensor, batch: int) -> Tensor:
    """[N, G, b, .] -> [B, G * b, H, .]."""
    return x.unflatten(0, (batch, -1)).permute(0, 2, 3, 1, 4).flatten(1, 2)
