"""One tile of the chunked scan, forward. With the tables (tables.py) and the write's factors a [b, d_in], e [b, d_out] (network.py):

    V+ = beta_b V + f_b S,  S+ = m_b S           carry
    X+ -= [last o a]^T e                         write
    x_t W_t = [read_t o x_t] X + x_t W_init - [(G o x a^T) e]_t

States are the bulk of the traffic for small chunks, so a tile is worked through while its state is in the caches, in place.
"""

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunked.network import gelu
from titans_pretrain.kernels.memory_scan.chunked.tiles import Matrices, Tile


def scale(x: Tensor, coefficients: Tensor) -> Tensor:
    """Copies of x [BH, b, d], one per coefficient [BH, b, n], scaled and side by side: [BH, b, n * d]."""
    return (x.unsqueeze(-2) * coefficients.unsqueeze(-1)).flatten(-2)


def read_layers(q: Tensor, tile: Tile) -> list[tuple[Tensor, Tensor]]:
    """Inputs and pre-activations (x_{l-1}, p_l) of every memory layer at the per-token weights; the last p is z_L."""
    layers, h = [], q
    for layer, (t, x) in enumerate(zip(tile.tables, tile.state, strict=True)):
        p = scale(h, t.read) @ x
        if tile.towards is not None:
            p.baddbmm_(h, tile.towards[layer])
        p.baddbmm_(t.G * (h @ tile.gradient.inputs[layer].mT), tile.gradient.deltas[layer], alpha=-1)
        layers.append((h, p))
        if layer < len(tile.state) - 1:
            h = gelu(p)
    return layers


def read(q: Tensor, tile: Tile) -> Tensor:
    return read_layers(q, tile)[-1][1]


def write(tile: Tile, out: Matrices) -> None:
    for t, x, a, e, new in zip(tile.tables, tile.state, tile.gradient.inputs, tile.gradient.deltas, out, strict=True):
        beta, f, m = t.carry[..., None, None].unbind(1)
        (v, s), (new_v, new_s) = x.chunk(2, 1), new.chunk(2, 1)
        torch.mul(v, beta, out=new_v).addcmul_(s, f)
        torch.mul(s, m, out=new_s)
        new.baddbmm_(scale(a, t.last).mT, e, alpha=-1)
