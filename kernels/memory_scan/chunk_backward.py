"""One span of the chunked scan, backward, by hand: the read's adjoint in parallel, then the write's in reverse order.

Names: d_x is the gradient of x. Layout and formulas as in chunk_forward.py; everything is recomputed from the span's first state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunk_forward import (
    Matrices,
    SpanInputs,
    Written,
    gate_of,
    read,
    shared_matmul,
)
from titans_pretrain.kernels.memory_scan.gates import Tables, decay_tables_backward
from titans_pretrain.kernels.memory_scan.network import (
    InnerGradient,
    gelu_derivatives,
    gelu_vjp,
    layer_norm,
    layer_norm_vjp,
)
from titans_pretrain.kernels.memory_scan.spans import Span


@dataclass
class TableGradients:
    """Gradients of the entries of the tables that the scan reads, [N, G, gates, ...]."""

    weight: Tensor  # C
    beta: Tensor
    f: Tensor
    last_surprise: Tensor  # N's last row
    last_m: Tensor

    @staticmethod
    def zeros(tables: Tables) -> "TableGradients":
        z = torch.zeros_like
        return TableGradients(z(tables.weight), z(tables.beta), z(tables.f), z(tables.beta), z(tables.m[..., -1]))


@dataclass
class ReadGradients:
    q: Tensor
    inputs: list[Tensor]  # of the write's factors a_{l-1} and e_l, through the read
    deltas: list[Tensor]
    weights: Matrices  # of the states at the tiles' starts [N, G, d_in, d_out]
    surprise: Matrices
    towards: Matrices | None  # of W_init [N, d_in, d_out]


def read_backward(
    d_y: Tensor,
    x: SpanInputs,
    tables: Tables,
    written: Written,
    d_tables: TableGradients,
    *,
    residual_norm: bool,
    towards: Matrices | None,
) -> ReadGradients:
    """Adjoint of read(); adds to d_tables."""
    layers = read(x, tables, written, towards)
    depth = len(layers)
    d_inputs, d_deltas, d_weights, d_surprise, d_towards = ([None] * depth for _ in range(5))
    d_p = d_y
    if residual_norm:
        z = layers[-1][1]
        _, mean, rstd = layer_norm(z)
        d_p = layer_norm_vjp(d_y, z, mean, rstd)
    for layer in reversed(range(depth)):
        h, p = layers[layer]
        gate = gate_of(layer, tables)
        t = tables.at(gate)
        a, e = written.gradient.inputs[layer], written.gradient.deltas[layer]
        if layer < depth - 1:
            d_p = gelu_vjp(d_h, p)  # noqa: F821  set by the layer above
        overlap, d_overlap = h @ a.mT, d_p @ e.mT
        masked = t.weight * d_overlap
        d_tables.weight[:, :, gate] -= d_overlap * overlap
        d_inputs[layer] = -(masked.mT @ h)
        d_deltas[layer] = -((t.weight * overlap).mT @ d_p)
        d_h, d_beta, d_weights[layer] = _scaled_matmul_backward(t.beta, h, written.weights[layer], d_p)
        d_hs, d_f, d_surprise[layer] = _scaled_matmul_backward(t.f, h, written.surprise[layer], d_p)
        d_h += d_hs
        d_h -= masked @ a
        if towards is not None:
            back = shared_matmul(d_p, towards[layer].mT)
            rest = (1 - t.beta).unsqueeze(-1)
            d_h.addcmul_(back, rest)
            d_beta -= (h * back).sum(-1)
            d_towards[layer] = (h * rest).flatten(1, 2).mT @ d_p.flatten(1, 2)
        d_tables.beta[:, :, gate] += d_beta
        d_tables.f[:, :, gate] += d_f
    d_q = d_h + d_y if residual_norm else d_h
    return ReadGradients(d_q, d_inputs, d_deltas, d_weights, d_surprise, d_towards if towards is not None else None)


def _scaled_matmul_backward(coefficient: Tensor, x: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoint of scaled_matmul: gradients of x, coefficient and w."""
    back = d @ w.mT
    d_coefficient = (x * back).sum(-1)
    c = coefficient.unsqueeze(-1)
    d_w = (x * c).mT @ d if w.shape[-2] <= w.shape[-1] else x.mT @ (d * c)
    return back.mul_(c), d_coefficient, d_w


@dataclass
class SpanGradients:
    inputs: SpanInputs
    weights: Matrices  # of the state that entered the span
    surprise: Matrices
    anchor: Matrices | None  # of the anchor that entered it
    initial_weights: Matrices | None  # through resets, and through forgetting towards W_init
    initial_surprise: Matrices | None


def span_backward(
    span: Span,
    x: SpanInputs,
    tables: Tables,
    written: Written,
    d_y: Tensor,
    d_weights: Matrices,
    d_surprise: Matrices,
    d_anchor: Matrices | None,
    *,
    residual_norm: bool,
    towards: Matrices | None,
    reset: Tensor | None,
) -> SpanGradients:
    """d_y [N, G, b, D]; d_weights, d_surprise: of the state after the span; d_anchor: of the anchor left to the next span."""
    depth = len(d_weights)
    d_tables = TableGradients.zeros(tables)
    through_read = read_backward(d_y, x, tables, written, d_tables, residual_norm=residual_norm, towards=towards)
    d_initial_w = through_read.towards
    d_initial_s = None
    if reset is not None:
        d_initial_w = d_initial_w or [torch.zeros_like(w) for w in d_weights]
        d_initial_s = [torch.zeros_like(s) for s in d_surprise]

    first, second = zip(*(gelu_derivatives(z) for z in written.gradient.pre), strict=True) if depth > 1 else ((), ())
    curvature = [g * s for g, s in zip(written.gradient.back, second, strict=True)]  # d e_l / d z_l through gelu'
    d_k, d_v = torch.empty_like(x.k), torch.empty_like(x.v)
    for tile in reversed(range(span.tiles)):
        at = _tile(written.gradient, tile)
        d_a = [y[:, tile] for y in through_read.inputs]
        d_e = [y[:, tile] for y in through_read.deltas]
        for layer in range(depth):
            gate = gate_of(layer, tables)
            a, e = at.inputs[layer], at.deltas[layer]
            d_c, d_s = d_tables.weight[:, tile, gate, -1], d_tables.last_surprise[:, tile, gate]
            _subtract_outer_backward(tables.weight[:, tile, gate, -1], a, e, d_weights[layer], d_c, d_a[layer], d_e[layer])
            _subtract_outer_backward(tables.surprise[:, tile, gate, -1], a, e, d_surprise[layer], d_s, d_a[layer], d_e[layer])
        d_anchor_tile = _inner_gradient_backward(
            at, written.anchors[tile], d_a, d_e, [y[:, tile] for y in first], [y[:, tile] for y in curvature],
            d_k[:, tile], d_v[:, tile], residual_norm,
        )  # fmt: skip
        d_anchor = d_anchor_tile if d_anchor is None else [p + n for p, n in zip(d_anchor, d_anchor_tile, strict=True)]
        for layer in range(depth):
            d_weights[layer], d_surprise[layer] = _mix_backward(
                layer, tile, tables, written, towards, d_weights[layer], d_surprise[layer], d_tables, d_initial_w
            )
            d_weights[layer] += through_read.weights[layer][:, tile]
            d_surprise[layer] += through_read.surprise[layer][:, tile]
        if span.opens(tile):
            d_weights = [w + a for w, a in zip(d_weights, d_anchor, strict=True)]
            d_anchor = None
            if reset is not None:
                row = reset[:, span.chunk_of(tile)].view(-1, 1, 1)
                for layer in range(depth):
                    d_initial_w[layer] += d_weights[layer] * row
                    d_initial_s[layer] += d_surprise[layer] * row
                    d_weights[layer] = d_weights[layer].masked_fill(row, 0)
                    d_surprise[layer] = d_surprise[layer].masked_fill(row, 0)
    d_gates = decay_tables_backward(
        tables, d_tables.weight, d_tables.beta, d_tables.f, d_tables.last_surprise, d_tables.last_m
    )
    return SpanGradients(
        SpanInputs(through_read.q, d_k, d_v, *d_gates), d_weights, d_surprise, d_anchor, d_initial_w, d_initial_s
    )


def _tile(g: InnerGradient, tile: int) -> InnerGradient:
    def pick(xs):
        return [y[:, tile] for y in xs]

    norm = g.norm and tuple(pick(g.norm))
    return InnerGradient(pick(g.inputs), pick(g.deltas), pick(g.pre), pick(g.back), g.out[:, tile], norm)


def _subtract_outer_backward(
    coefficient: Tensor, a: Tensor, e: Tensor, d_state: Tensor, d_coefficient: Tensor, d_a: Tensor, d_e: Tensor
) -> None:
    """Adjoint of subtract_outer: takes its share from d_coefficient [N, b], d_a and d_e in place."""
    forth, back = a @ d_state, e @ d_state.mT
    d_coefficient -= (a * back).sum(-1) if a.shape[-1] <= e.shape[-1] else (forth * e).sum(-1)
    c = coefficient.unsqueeze(-1)
    d_e.addcmul_(forth, c, value=-1)
    d_a.addcmul_(back, c, value=-1)


def _inner_gradient_backward(
    g: InnerGradient,
    anchor: Matrices,
    d_a: list[Tensor],
    d_e: list[Tensor],
    first: list[Tensor],
    curvature: list[Tensor],
    d_k: Tensor,
    d_v: Tensor,
    residual_norm: bool,
) -> Matrices:
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
        d_r = last
        d_z = 2 * last
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


def _mix_backward(
    layer: int,
    tile: int,
    tables: Tables,
    written: Written,
    towards: Matrices | None,
    d_weights: Tensor,
    d_surprise: Tensor,
    d_tables: TableGradients,
    d_initial_w: Matrices | None,
) -> tuple[Tensor, Tensor]:
    """Adjoint of W+ = beta W + f S + (1 - beta) W_init, S+ = m S: the gradients of W and S."""
    gate = gate_of(layer, tables)
    beta, f, m = (y[:, tile, gate, -1, None, None] for y in (tables.beta, tables.f, tables.m))
    w, s = written.weights[layer][:, tile], written.surprise[layer][:, tile]
    if towards is not None:
        w = w - towards[layer]
        d_initial_w[layer].addcmul_(d_weights, 1 - beta)
    d_tables.beta[:, tile, gate, -1] += _dot(d_weights, w)
    d_tables.f[:, tile, gate, -1] += _dot(d_weights, s)
    d_tables.last_m[:, tile, gate] += _dot(d_surprise, s)
    return d_weights * beta, torch.addcmul(d_weights * f, d_surprise, m)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """[N, d_in, d_out] twice -> [N]."""
    return (x.flatten(1).unsqueeze(1) @ y.flatten(1).unsqueeze(2)).flatten()
