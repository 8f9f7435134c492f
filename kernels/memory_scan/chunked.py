"""The dual form in torch, any device: exact, linear in T, with a hand-written backward pass.

States are saved at span starts only (spans.py) and recomputed inside a span in the backward pass.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_pretrain.kernels.memory_scan.chunk_backward import span_backward
from titans_pretrain.kernels.memory_scan.chunk_forward import Matrices, SpanInputs, Written, read, read_output, write
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
        self.tokens, self.spans, self.residual_norm, self.depth = tokens, spans, residual_norm, depth
        heads = tokens[0].shape[2]
        self.dtype = states[0].dtype
        matrices = [s.flatten(0, 1).contiguous() for s in states]
        groups = [matrices[i : i + depth] for i in range(0, len(matrices), depth)]
        self.weights, self.surprise = groups[:2]
        self.anchor = groups[2] if half_read else None
        self.initial = tuple(groups[-2:]) if len(groups) > 2 + half_read else None
        self.towards = self.initial[0] if forget_to_initial else None
        self.reset = None if reset is None else reset.repeat_interleave(heads, 0)

    def inputs(self, span: Span) -> SpanInputs:
        return SpanInputs.cut(span, *self.tokens, self.dtype)

    def write(self, span: Span, x: SpanInputs, tables, weights, surprise, anchor) -> Written:
        return write(
            span, x, tables, weights, surprise, anchor,
            residual_norm=self.residual_norm, towards=self.towards, reset=self.reset, initial=self.initial,
        )  # fmt: skip


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, forget, momentum, lr, reset, spans, residual_norm, forget_to_initial, half_read, leaves_half, depth, *states):
        tokens = (q, k, v, forget, momentum, lr)
        config = (spans, residual_norm, forget_to_initial, half_read, depth)
        walk = _Walk(tokens, reset, *config, states)
        batch, heads = q.shape[0], q.shape[2]
        y = torch.empty_like(q, memory_format=torch.contiguous_format)
        weights, surprise, anchor = walk.weights, walk.surprise, walk.anchor
        saved: list[tuple[Matrices, Matrices, Matrices | None]] = []
        for span in spans:
            saved.append((weights, surprise, anchor))
            x = walk.inputs(span)
            tables = x.tables()
            written = walk.write(span, x, tables, weights, surprise, anchor)
            layers = read(x, tables, written, walk.towards)
            y[:, span.start : span.stop] = _tokens(read_output(layers, x.q, residual_norm), batch)
            weights, surprise, anchor = written.last_weights, written.last_surprise, written.last_anchor
        ctx.save_for_backward(*tokens, reset, *states)
        ctx.config, ctx.saved, ctx.leaves_half = config, saved, leaves_half
        out = [*weights, *surprise, *(anchor if leaves_half else ())]
        return (y, *(o.unflatten(0, (batch, heads)) for o in out))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, *d_states):
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks only once
        (*tokens, reset), states = saved[:7], saved[7:]
        spans, _, _, half_read, depth = ctx.config
        with torch.autocast(d_y.device.type, enabled=False):
            walk = _Walk(tokens, reset, *ctx.config, states)
            batch = d_y.shape[0]
            d_matrices = [d.to(walk.dtype).flatten(0, 1).contiguous() for d in d_states]
            d_weights, d_surprise = d_matrices[:depth], d_matrices[depth : 2 * depth]
            d_anchor = d_matrices[2 * depth :] if ctx.leaves_half else None
            d_initial = None
            if walk.initial is not None:
                d_initial = [torch.zeros_like(m) for group in walk.initial for m in group]
            d_tokens = [torch.empty_like(t) for t in tokens]
            for span, (weights, surprise, anchor) in zip(reversed(spans), reversed(ctx.saved), strict=True):
                x = walk.inputs(span)
                tables = x.tables()
                written = walk.write(span, x, tables, weights, surprise, anchor)
                d_span = d_y[:, span.start : span.stop].unflatten(1, (span.tiles, span.tile)).permute(0, 3, 1, 2, 4)
                d = span_backward(
                    span, x, tables, written, d_span.flatten(0, 1).to(walk.dtype).contiguous(), d_weights, d_surprise, d_anchor,
                    residual_norm=walk.residual_norm, towards=walk.towards, reset=walk.reset,
                )  # fmt: skip
                d_weights, d_surprise, d_anchor = d.weights, d.surprise, d.anchor
                for total, part in zip(d_initial or (), (d.initial_weights or []) + (d.initial_surprise or [])):
                    total += part
                rows = (d.inputs.q, d.inputs.k, d.inputs.v, d.inputs.forget.mT, d.inputs.momentum.mT, d.inputs.lr.mT)
                for total, part in zip(d_tokens, rows, strict=True):
                    total[:, span.start : span.stop] = _tokens(part, batch)
            d_in = [*d_weights, *d_surprise, *(d_anchor if half_read else ()), *(d_initial or ())]
        return (*d_tokens, *[None] * 7, *(d.unflatten(0, (batch, -1)) for d in d_in))


def _tokens(x: Tensor, batch: int) -> Tensor:
    """[N, G, b, .] -> [B, G * b, H, .]."""
    return x.unflatten(0, (batch, -1)).permute(0, 2, 3, 1, 4).flatten(1, 2)
