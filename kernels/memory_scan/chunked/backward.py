"""One tile of the chunked scan, backward, by hand. Names: d_x is the gradient of x. Formulas as in forward.py."""

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunked.forward import read_layers, scale
from titans_pretrain.kernels.memory_scan.chunked.network import (
    InnerGradient,
    Network,
    gelu_derivatives,
    gelu_vjp,
    layer_norm,
    layer_norm_vjp,
)
from titans_pretrain.kernels.memory_scan.chunked.tables import TileTables
from titans_pretrain.kernels.memory_scan.chunked.tiles import Matrices, StateGradients, Tile


def backward(
    d_y: Tensor, q: Tensor, z: Tensor | None, tile: Tile, anchor: Matrices, network: Network, d_tables: list[TileTables],
    d: StateGradients,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See TileFunctions; the residual of M adds d_y to the gradient of q and -d_v to that of k. d.state: of the state after the
    tile, on return of the one before it, the anchor's part left out. z: None where `read` gives all of it."""
    depth = len(tile.state)
    gradient = tile.gradient
    d_a, d_e, reads = ([None] * depth for _ in range(3))
    layers = read_layers(q, tile)
    d_h = d_y
    for layer in reversed(range(depth)):
        h, p = layers[layer]
        if layer < depth - 1:
            d_p = gelu_vjp(d_h, p)
        elif network.residual_norm:
            z = p if z is None else z
            d_p = layer_norm_vjp(d_h, z, *layer_norm(z)[1:])
        else:
            d_p = d_h
        t, a, e = tile.tables[layer], gradient.inputs[layer], gradient.deltas[layer]
        overlap, d_masked = h @ a.mT, d_p @ e.mT
        d_tables[layer].G.addcmul_(d_masked, overlap, value=-1)
        d_overlap = t.G * d_masked
        d_a[layer] = (d_overlap.mT @ h).neg_()
        d_e[layer] = (overlap.mul_(t.G).mT @ d_p).neg_()
        d_h = _scale_backward(d_p @ tile.state[layer].mT, h, t.read, d_tables[layer].read, 1)
        d_h.baddbmm_(d_overlap, a, alpha=-1)
        if tile.towards is not None:
            d_h.baddbmm_(d_p, tile.towards[layer].mT)
            d.towards[layer].baddbmm_(h.mT, d_p)
        reads[layer] = (scale(h, t.read), d_p)
    for layer, t in enumerate(tile.tables):
        a, e = gradient.inputs[layer], gradient.deltas[layer]
        d_a[layer] -= _scale_backward(e @ d.state[layer].mT, a, t.last, d_tables[layer].last, -1)
        d_e[layer].baddbmm_(scale(a, t.last), d.state[layer], alpha=-1)
        _carry_backward(d.state[layer], tile.state[layer], t.carry, d_tables[layer].carry)
        scaled, d_p = reads[layer]
        d.state[layer].baddbmm_(scaled.mT, d_p)
    d_k, d_v, d_anchor = _inner_gradient_backward(gradient, anchor, d_a, d_e, network)
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
    d_slots, slots = (x.unflatten(1, (2, -1)).flatten(2) for x in (d, state))  # [BH, 2, d_in * d_out]
    pairs = d_slots @ slots.mT
    d_coefficients[:, :2] += pairs[:, 0]
    d_coefficients[:, 2] += pairs[:, 1, 1]
    beta, f, m = coefficients[..., None, None].unbind(1)
    d_v, d_s = d.chunk(2, 1)
    d_s.mul_(m).addcmul_(d_v, f)
    d_v.mul_(beta)


def _inner_gradient_backward(
    g: InnerGradient, anchor: Matrices, d_a: list[Tensor], d_e: list[Tensor], network: Network
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
    last = network.split.sum(d_e[-1])
    if network.residual_norm:
        n, mean, rstd, r = g.norm
        along_e = (last * g.deltas[-1]).sum(-1, keepdim=True)
        last = g.damp * last
        d_r = layer_norm_vjp(last, g.out, mean, rstd)
        size = n.shape[-1]
        along_r, along_d = (r * n).sum(-1, keepdim=True), (last * n).sum(-1, keepdim=True)
        d_n = torch.addcmul(2 * d_r, rstd / size, along_r * last + along_d * r, value=-1)
        d_std = along_e * rstd * (2 * network.eps * g.damp * rstd.square() - 1)
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
