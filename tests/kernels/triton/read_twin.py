"""Gradients of a tile's reads by autograd, float64."""

import torch
from tile_cases import Case, TileTwin, heads
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunked.forward import read_layers
from titans_pretrain.kernels.memory_scan.chunked.network import InnerGradient, output
from titans_pretrain.kernels.memory_scan.chunked.tables import TileTables
from titans_pretrain.kernels.memory_scan.chunked.tiles import Tile


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def reads_of(case: Case, twin: TileTwin, d_y: Tensor) -> dict[str, Tensor]:
    """Gradients of a tile's reads with respect to all that they are computed from; those of shared gates summed."""
    call, tile = case.call, twin.tile
    q = leaf(heads(case.q)[:, twin.positions])
    sets = [(leaf(t.G), leaf(t.read)) for t in tile.tables[: call.gates]]
    tables = [TileTables(*sets[i % call.gates], t.last, t.carry) for i, t in enumerate(tile.tables)]
    inputs, deltas = [leaf(a) for a in tile.gradient.inputs], [leaf(e) for e in tile.gradient.deltas]
    gradient = InnerGradient(inputs, deltas, [], [], tile.gradient.out, None, 1.0)
    layers = read_layers(q, Tile(tables, tile.state, gradient, tile.towards))
    pre = [p for _, p in layers]
    y = output(pre[-1], q, call.residual_norm)
    leaves = {
        "d_q": q,
        "d_k": inputs[0],
        "d_a": inputs[-1],
        "d_e1": deltas[0],
        "d_e2": deltas[-1],
        "d_p1": pre[0],
        "d_p2": pre[-1],
    }
    for i, (G, read) in enumerate(sets):
        leaves |= {f"d_G{i}": G, f"d_read{i}": read}
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), d_y), strict=True))
    return {"x": layers[-1][0].detach()} | found
