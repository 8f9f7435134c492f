"""One tile of the chunked scan, forward.

N = batch * heads, b tokens per tile, tokens [N, b, .]. The state of a memory layer is one matrix X [N, 2 * d_in, d_out], two slots
stacked by rows: W and S, or V = W - W_init and S when forgetting goes there: the difference is what decays, and nothing cancels in
its gradient. With the tables of gates.py and the write's factors a [b, d_in], e [b, d_out] (network.py):

    V+ = beta_b V + f_b S,  S+ = m_b S           carry
    X+ -= [last o a]^T e                         write
    x_t W_t = [read_t o x_t] X + x_t W_init - [(C o x a^T) e]_t

States are the bulk of the traffic for small chunks, so a tile is worked through while its state is in the caches, in place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.gates import TableGradients, Tables, TileTables, decay_tables
from titans_pretrain.kernels.memory_scan.network import InnerGradient, gelu
from titans_pretrain.kernels.memory_scan.spans import Span

Matrices = list[Tensor]  # one per memory layer


@dataclass
class SpanInputs:
    """A span's tokens q, k, v [N, G, b, D] and gates [N, G, gates, b], in the state's dtype; G tiles."""

    q: Tensor
    k: Tensor
    v: Tensor
    forget: Tensor
    momentum: Tensor
    lr: Tensor

    @staticmethod
    def cut(span: Span, q, k, v, forget, momentum, lr, dtype) -> "SpanInputs":
        """From [B, T, H, .] tensors."""
        rows = [span_rows(span, x).to(dtype) for x in (q, k, v, forget, momentum, lr)]
        return SpanInputs(*(x.contiguous() for x in rows[:3]), *(x.mT.contiguous() for x in rows[3:]))

    def tables(self) -> Tables:
        return decay_tables(self.forget, self.momentum, self.lr)


def span_rows(span: Span, x: Tensor) -> Tensor:
    """[B, T, H, .] -> [N, G, b, .] of the span's tokens."""
    x = x[:, span.start : span.stop].unflatten(1, (span.tiles, span.tile))
    return x.permute(0, 3, 1, 2, 4).flatten(0, 1)


def tile_tables(tables: Tables | TableGradients, tile: int, depth: int) -> list[TileTables]:
    """A tile's coefficients for every memory layer: of its own gate, or of the shared one."""
    gates = [tables.at(tile, gate) for gate in range(tables.weight.shape[2])]
    return gates if len(gates) == depth else gates * depth


def scale(x: Tensor, coefficients: Tensor) -> Tensor:
    """Copies of x [N, b, d], one per coefficient [N, b, n], scaled and side by side: [N, b, n * d]."""
    return (x.unsqueeze(-2) * coefficients.unsqueeze(-1)).flatten(-2)


def read(q: Tensor, tables: list[TileTables], state: Matrices, gradient: InnerGradient, towards: Matrices | None):
    """Inputs and pre-activations (x_{l-1}, p_l) of every memory layer at the per-token weights; the last p is z."""
    layers, h = [], q
    for layer, (t, x) in enumerate(zip(tables, state, strict=True)):
        p = scale(h, t.read) @ x
        if towards is not None:
            p.baddbmm_(h, towards[layer])
        p.baddbmm_(t.weight * (h @ gradient.inputs[layer].mT), gradient.deltas[layer], alpha=-1)
        layers.append((h, p))
        if layer < len(state) - 1:
            h = gelu(p)
    return layers


def write(tables: list[TileTables], state: Matrices, gradient: InnerGradient, out: Matrices) -> None:
    """The state after the tile into `out`, which may be `state` itself."""
    for t, x, a, e, new in zip(tables, state, gradient.inputs, gradient.deltas, out, strict=True):
        beta, f, m = t.carry[..., None, None].unbind(1)
        (v, s), (new_v, new_s) = x.chunk(2, 1), new.chunk(2, 1)
        torch.mul(v, beta, out=new_v).addcmul_(s, f)
        torch.mul(s, m, out=new_s)
        new.baddbmm_(scale(a, t.last).mT, e, alpha=-1)
