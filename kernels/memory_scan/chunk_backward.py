"""One tile of the chunked scan, backward, by hand. Names: d_x is the gradient of x. Formulas as in chunk_forward.py."""

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunk_forward import Matrices, read, scale
from titans_pretrain.kernels.memory_scan.gates import TileTables
from titans_pretrain.kernels.memory_scan.hidden_split import HiddenGroup, sum_over_ranks
from titans_pretrain.kernels.memory_scan.network import (
    InnerGradient,
    gelu_derivatives,
    gelu_vjp,
    layer_norm,
    layer_norm_vjp,
)


@dataclass
class StateGradients:
    """Gradients that the walk carries from tile to tile, changed in place."""

    state: Matrices  # of the state [N, 2 * d_in, d_out]
    anchor: Matrices | None  # of the chunk's anchor [N, d_in, d_out]; None before anything reached it
    towards: Matrices | None  # of W_init [N, d_in, d_out]


def tile_backward(
    d_y: Tensor, q: Tensor, tables: list[TileTables], state: Matrices, anchor: Matrices, gradient: InnerGradient,
    towards: Matrices | None, d_tables: list[TileTables], d: StateGradients, residual_norm: bool,
    eps: float, hidden_group: HiddenGroup, z: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v; those of q and k through the weights alone (the residual adds d_y and -d_v), with a hidden_group
    partial. d.state: of the state after the tile, on return of the one before it, the anchor's part left out. z: the reads' z_L,
    where `read` gives only a part of it."""
    depth = len(state)
    d_a, d_e, reads = ([None] * depth for _ in range(3))
    layers = read(q, tables, state, gradient, towards)
    d_h = d_y
    for layer in reversed(range(depth)):
        h, p = layers[layer]
        if layer < depth - 1:
            d_p = gelu_vjp(d_h, p)
        elif residual_norm:
            z = p if z is None else z
            d_p = layer_norm_vjp(d_h, z, *layer_norm(z)[1:])
        else:
            d_p = d_h
        t, a, e = tables[layer], gradient.inputs[layer], gradient.deltas[layer]
        overlap, d_masked = h @ a.mT, d_p @ e.mT
        d_tables[layer].weight.addcmul_(d_masked, overlap, value=-1)
        d_overlap = t.weight * d_masked
        d_a[layer] = (d_overlap.mT @ h).neg_()
        d_e[layer] = (overlap.mul_(t.weight).mT @ d_p).neg_()
        d_h = _scale_backward(d_p @ state[layer].mT, h, t.read, d_tables[layer].read, 1)
        d_h.baddbmm_(d_overlap, a, alpha=-1)
        if towards is not None:
            d_h.baddbmm_(d_p, towards[layer].mT)
            d.towards[layer].baddbmm_(h.mT, d_p)
        reads[layer] = (scale(h, t.read), d_p)
    for layer, t in enumerate(tables):
        a, e = gradient.inputs[layer], gradient.deltas[layer]
        d_a[layer] -= _scale_backward(e @ d.state[layer].mT, a, t.last, d_tables[layer].last, -1)
        d_e[layer].baddbmm_(scale(a, t.last), d.state[layer], alpha=-1)
        _carry_backward(d.state[layer], state[layer], t.carry, d_tables[layer].carry)
        scaled, d_p = reads[layer]
        d.state[layer].baddbmm_(scaled.mT, d_p)
    d_k, d_v, d_anchor = _inner_gradient_backward(gradient, anchor, d_a, d_e, residual_norm, eps, hidden_group)
    d.anchor = d_anchor if d.anchor is None else [old.add_(new) for old, new in zip(d.anchor, d_anchor, strict=True)]
    return d_h, d_k, d_v


def _scale_backward(d: Tensor, x: Tensor, coefficients: Tensor, d_coefficients: Tensor, sign: int) -> Tensor:
    """Adjoint of scale with two coefficients: the gradient of x; adds sign times theirs to d_coefficients."""
    d = d.unflatten(-1, (2, -1))
    d_coefficients.add_((d * x.unsqueeze(-2)).sum(-1), alpha=sign)
    first, second = d.unbind(-2)
    return torch.addcmul(first * coefficients[..., :1], second, coefficients[..., 1:])


def _carry_backward(d: Tensor, state: Tensor, coefficients: Tensor, d_coefficients: Tensor) -> None:
    """Adjoint of the carry: turns d, the gradient of the state after the tile, into that of the state before it."""
    pairs = d.unflatten(1, (2, -1)).flatten(2) @ state.unflatten(1, (2, -1)).flatten(2).mT  # [N, 2, 2]
    d_coefficients += pairs.flatten(1)[:, [0, 1, 3]]
    beta, f, m = coefficients[..., None, None].unbind(1)
    d_v, d_s = d.chunk(2, 1)
    d_s.mul_(m).addcmul_(d_v, f)
    d_v.mul_(beta)


def _inner_gradient_backward(
    g: InnerGradient,
    anchor: Matrices,
    d_a: list[Tensor],
    d_e: list[Tensor],
    residual_norm: bool,
    eps: float,
    hidden_group: HiddenGroup,
) -> tuple[Tensor, Tensor, Matrices]:
    """Adjoint of inner_gradient: gradients of k (the residual's left out), v and the anchor. Overwrites d_a and d_e."""
    depth = len(anchor)
    d_anchor: Matrices = [None] * depth
    first, d_pre = [], []
    for layer in range(depth - 1):  # back through the deltas, from the first layer up
        slope, curvature = gelu_derivatives(g.pre[layer])
        first.append(slope)
        d_pre.append(curvature.mul_(g.back[layer]).mul_(d_e[layer]))
        d_back = d_e[layer] * slope
        d_e[layer + 1].baddbmm_(d_back, anchor[layer + 1])
        d_anchor[layer + 1] = d_back.mT @ g.deltas[layer + 1]
    last = sum_over_ranks(d_e[-1], hidden_group)
    if residual_norm:
        n, mean, rstd, r = g.norm
        along_e = (last * g.deltas[-1]).sum(-1, keepdim=True)
        last = g.damp * last
        d_r = layer_norm_vjp(last, g.out, mean, rstd)
        size = n.shape[-1]
        along_r, along_d = (r * n).sum(-1, keepdim=True), (last * n).sum(-1, keepdim=True)
        d_n = torch.addcmul(2 * d_r, rstd / size, along_r * last + along_d * r, value=-1)
        d_std = along_e * rstd * (2 * eps * g.damp * rstd.square() - 1)
        d_z = torch.addcmul(layer_norm_vjp(d_n, g.out, mean, rstd), d_std / size, n)
    else:
        d_r, d_z = last, 2 * last
    for layer in reversed(range(depth)):  # back through the activations, from the last layer down
        a = g.inputs[layer]
        d_anchor[layer] = a.mT @ d_z if d_anchor[layer] is None else d_anchor[layer].baddbmm_(a.mT, d_z)
        d_a[layer].baddbmm_(d_z, anchor[layer].mT)
        if layer:
            d_z = d_pre[layer - 1].addcmul_(d_a[layer], first[layer - 1])
    return d_a[0], -2 * d_r, d_anchor
