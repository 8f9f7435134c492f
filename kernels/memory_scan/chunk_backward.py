"""One span of the chunked scan, backward, by hand: the read's adjoint in parallel, then the write's in reverse order.

Names: d_x is the gradient of x. Layout and formulas as in chunk_forward.py; everything is recomputed from the span's first state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunk_forward import Matrices, SpanInputs, Written, gate_of, read, scale
from titans_pretrain.kernels.memory_scan.gates import TableGradients, Tables, decay_tables_backward
from titans_pretrain.kernels.memory_scan.network import (
    InnerGradient,
    gelu_derivatives,
    gelu_vjp,
    layer_norm,
    layer_norm_vjp,
)
from titans_pretrain.kernels.memory_scan.spans import Span


@dataclass
class ReadGradients:
    q: Tensor
    inputs: list[Tensor]  # of the write's factors a and e, through the read
    deltas: list[Tensor]
    states: Matrices  # of the states at the tiles' starts


def read_backward(
    d_y: Tensor, q: Tensor, tables: Tables, written: Written, d_tables: TableGradients, *, residual_norm: bool
) -> ReadGradients:
    """Adjoint of read() and the output; adds to d_tables."""
    layers = read(q, tables, written)
    depth = len(layers)
    d_inputs, d_deltas, d_states = ([None] * depth for _ in range(3))
    d_h = d_y
    for layer in reversed(range(depth)):
        h, p = layers[layer]
        if layer < depth - 1:
            d_p = gelu_vjp(d_h, p)
        elif residual_norm:
            d_p = layer_norm_vjp(d_h, p, *layer_norm(p)[1:])
        else:
            d_p = d_h
        gate = gate_of(layer, tables)
        a, e = written.gradient.inputs[layer], written.gradient.deltas[layer]
        overlap, d_masked = h @ a.mT, d_p @ e.mT
        d_overlap = tables.weight[:, :, gate] * d_masked
        d_tables.weight[:, :, gate] -= d_masked * overlap
        d_inputs[layer] = (d_overlap.mT @ h).neg_()
        d_deltas[layer] = ((tables.weight[:, :, gate] * overlap).mT @ d_p).neg_()
        coefficients = tables.read[:, :, gate]
        d_states[layer] = scale(h, coefficients).mT @ d_p
        d_h, d_read = _scale_backward(d_p @ written.states[layer].mT, h, coefficients)
        d_tables.read[:, :, gate] += d_read
        d_h -= d_overlap @ a
    return ReadGradients(d_h + d_y if residual_norm else d_h, d_inputs, d_deltas, d_states)


@dataclass
class SpanGradients:
    inputs: SpanInputs
    state: Matrices  # of the state that entered the span
    anchor: Matrices | None  # of the anchor that entered it
    initial: Matrices | None  # through resets


def span_backward(
    span: Span, x: SpanInputs, tables: Tables, written: Written, d_y: Tensor, d_state: Matrices, d_anchor: Matrices | None,
    *, residual_norm: bool, reset: Tensor | None,
) -> SpanGradients:  # fmt: skip
    """d_y [N, G, b, D]; d_state: of the state after the span; d_anchor: of the anchor left to the next span."""
    depth, slots = len(d_state), tables.read.shape[-1]
    d_tables = TableGradients.zeros(tables)
    through_read = read_backward(d_y, x.q, tables, written, d_tables, residual_norm=residual_norm)
    d_initial = None if reset is None else [torch.zeros_like(s) for s in d_state]
    derivatives = [gelu_derivatives(z) for z in written.gradient.pre]
    first = [d for d, _ in derivatives]
    curvature = [d.mul_(g) for (_, d), g in zip(derivatives, written.gradient.back, strict=True)]  # d e_l / d z_l
    d_k, d_v = torch.empty_like(x.k), torch.empty_like(x.v)
    for tile in reversed(range(span.tiles)):
        at = _tile(written.gradient, tile)
        d_a, d_e = ([y[:, tile] for y in ys] for ys in (through_read.inputs, through_read.deltas))
        for layer in range(depth):
            _write_backward(layer, tile, tables, at, d_state[layer], d_a[layer], d_e[layer], d_tables)
        d_here = _inner_gradient_backward(
            at, written.anchors[tile], d_a, d_e, [y[:, tile] for y in first], [y[:, tile] for y in curvature],
            d_k[:, tile], d_v[:, tile], residual_norm,
        )  # fmt: skip
        d_anchor = d_here if d_anchor is None else [p + n for p, n in zip(d_anchor, d_here, strict=True)]
        for layer in range(depth):
            gate, before = gate_of(layer, tables), written.states[layer][:, tile]
            _carry_backward(d_state[layer], before, slots, tables.carry[:, tile, gate], d_tables.carry[:, tile, gate])
            d_state[layer] += through_read.states[layer][:, tile]
        if span.opens(tile):
            for d, anchor in zip(d_state, d_anchor, strict=True):
                d[:, : anchor.shape[1]] += anchor
                if slots == 3:
                    d[:, -anchor.shape[1] :] += anchor
            d_anchor = None
            if reset is not None:
                row = reset[:, span.chunk_of(tile)].view(-1, 1, 1)
                for layer, d in enumerate(d_state):
                    d_initial[layer] += d * row
                    d_state[layer] = d.masked_fill(row, 0)
    d_gates = decay_tables_backward(tables, d_tables)
    return SpanGradients(SpanInputs(through_read.q, d_k, d_v, *d_gates), d_state, d_anchor, d_initial)


def _tile(g: InnerGradient, tile: int) -> InnerGradient:
    def pick(xs):
        return [y[:, tile] for y in xs]

    norm = g.norm and tuple(pick(g.norm))
    return InnerGradient(pick(g.inputs), pick(g.deltas), pick(g.pre), pick(g.back), g.out[:, tile], norm)


def _write_backward(
    layer: int, tile: int, tables: Tables, g: InnerGradient, d_state: Tensor, d_a: Tensor, d_e: Tensor, d_tables: TableGradients
) -> None:  # fmt: skip
    """Adjoint of X -= [last o a]^T e: takes its share from d_a, d_e and d_tables in place."""
    gate = gate_of(layer, tables)
    a, e, last = g.inputs[layer], g.deltas[layer], tables.last[:, tile, gate]
    d_written = d_state[:, : 2 * a.shape[-1]]
    through_a, through_last = _scale_backward(e @ d_written.mT, a, last)
    d_a -= through_a
    d_tables.last[:, tile, gate] -= through_last
    d_e.baddbmm_(scale(a, last), d_written, alpha=-1)


def _scale_backward(d: Tensor, x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Adjoint of scale: gradients of x and of the coefficients."""
    d = d.unflatten(-1, (coefficients.shape[-1], -1))
    parts = zip(d.unbind(-2), coefficients.split(1, -1), strict=True)
    first, c = next(parts)
    d_x = first * c
    for part, c in parts:
        d_x.addcmul_(part, c)
    return d_x, (d * x.unsqueeze(-2)).sum(-1)


def _carry_backward(d: Tensor, state: Tensor, slots: int, coefficients: Tensor, d_coefficients: Tensor) -> None:
    """Adjoint of carry: turns d, the gradient of the state after the tile, into that of the state before it."""
    beta, f, m = coefficients[..., None, None].unbind(1)
    d_first, d_surprise = d.chunk(slots, 1)[:2]
    pairs = _first_two(d, slots) @ _first_two(state, slots).mT  # [N, 2, 2]
    d_coefficients += pairs.flatten(1)[:, [0, 1, 3]]
    d_surprise.mul_(m).addcmul_(d_first, f)
    d_first.mul_(beta)


def _first_two(state: Tensor, slots: int) -> Tensor:
    """[N, K * d_in, d_out] -> [N, 2, d_in * d_out]."""
    return state.unflatten(1, (slots, -1))[:, :2].flatten(2)


def _inner_gradient_backward(
    g: InnerGradient, anchor: Matrices, d_a: list[Tensor], d_e: list[Tensor], first: list[Tensor], curvature: list[Tensor],
    d_k: Tensor, d_v: Tensor, residual_norm: bool,
) -> Matrices:  # fmt: skip
    """Adjoint of inner_gradient for one tile. first: gelu'(z_l), curvature: g_l gelu''(z_l). Fills d_k, d_v; returns d_anchor."""
    depth = len(anchor)
    d_anchor: Matrices = [None] * depth
    d_pre = []
    for layer in range(depth - 1):  # back through the deltas, from the first layer up
        d_back = d_e[layer] * first[layer]
        d_pre.append(d_e[layer] * curvature[layer])
        d_e[layer + 1].baddbmm_(d_back, anchor[layer + 1])
        d_anchor[layer + 1] = d_back.mT @ g.deltas[layer + 1]
    last = d_e[-1]
    if residual_norm:
        n, mean, rstd, r = g.norm
        d_r = layer_norm_vjp(last, g.out, mean, rstd)
        size = n.shape[-1]
        along_r, along_d = (r * n).sum(-1, keepdim=True), (last * n).sum(-1, keepdim=True)
        d_n = torch.addcmul(2 * d_r, rstd / size, along_r * last + along_d * r, value=-1)
        d_std = -rstd * (last * g.deltas[-1]).sum(-1, keepdim=True)
        d_z = torch.addcmul(layer_norm_vjp(d_n, g.out, mean, rstd), d_std / size, n)
    else:
        d_r, d_z = last, 2 * last
    torch.mul(d_r, -2, out=d_v)
    for layer in reversed(range(depth)):  # back through the activations, from the last layer down
        d_w = g.inputs[layer].mT @ d_z
        d_anchor[layer] = d_w if d_anchor[layer] is None else d_anchor[layer].add_(d_w)
        d_a[layer].baddbmm_(d_z, anchor[layer].mT)
        if layer:
            d_z = torch.addcmul(d_pre[layer - 1], d_a[layer], first[layer - 1])
    if residual_norm:
        torch.add(d_a[0], d_r, alpha=2, out=d_k)
    else:
        d_k.copy_(d_a[0])
    return d_anchor
