"""One span of the chunked scan, forward: a sequential write of the states, then one parallel read of all tiles.

Layout: N = batch * heads, G tiles, b tokens per tile; tokens [N, G, b, .], states over L of [N, d_in, d_out], the states at the
tiles' starts [N, G, d_in, d_out]. Inside a tile, with the tables of gates.py and the write's factors a, e:

    W+ = beta_b W + f_b S [+ (1 - beta_b) W_init] - (c o a)^T e        S+ = m_b S - (s o a)^T e        c, s: last rows of C, N
    x_t W_t = beta_t x_t W + f_t x_t S [+ (1 - beta_t) x_t W_init] - [(C o x a^T) e]_t
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.gates import Tables, decay_tables
from titans_pretrain.kernels.memory_scan.network import InnerGradient, gelu, inner_gradient, output
from titans_pretrain.kernels.memory_scan.spans import Span

Matrices = list[Tensor]  # one per memory layer


@dataclass
class SpanInputs:
    """A span's tokens q, k, v [N, G, b, D] and gates [N, G, gates, b], in the state's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    forget: Tensor
    momentum: Tensor
    lr: Tensor

    @staticmethod
    def cut(span: Span, q, k, v, forget, momentum, lr, dtype) -> "SpanInputs":
        """From [B, T, H, .] tensors."""

        def tiles(x: Tensor) -> Tensor:
            x = x[:, span.start : span.stop].unflatten(1, (span.tiles, span.tile))
            return x.permute(0, 3, 1, 2, 4).flatten(0, 1).to(dtype, memory_format=torch.contiguous_format)

        return SpanInputs(*(tiles(x).contiguous() for x in (q, k, v)), *(tiles(x).mT.contiguous() for x in (forget, momentum, lr)))

    def tables(self) -> Tables:
        return decay_tables(self.forget, self.momentum, self.lr)


@dataclass
class Written:
    """What writing a span leaves: the states at the tiles' starts, the factors of the writes, and the state after it."""

    weights: Matrices  # [N, G, d_in, d_out]
    surprise: Matrices
    anchors: list[Matrices]  # per tile, [N, d_in, d_out]
    gradient: InnerGradient  # fields stacked over the tiles, [N, G, b, .]
    last_weights: Matrices
    last_surprise: Matrices

    @property
    def last_anchor(self) -> Matrices:
        return self.anchors[-1]


def gate_of(layer: int, tables: Tables) -> int:
    """Index of the gate that drives a memory layer: its own, or the shared one."""
    return min(layer, tables.beta.shape[-2] - 1)


def write(
    span: Span,
    x: SpanInputs,
    tables: Tables,
    weights: Matrices,
    surprise: Matrices,
    anchor: Matrices | None,
    *,
    residual_norm: bool,
    towards: Matrices | None,
    reset: Tensor | None,
    initial: tuple[Matrices, Matrices] | None,
) -> Written:
    """Walk the tiles. towards: W_init [N, d_in, d_out] when forgetting goes there, else None. reset: [N, chunks of the call]."""
    depth = len(weights)
    starts_w, starts_s, anchors, gradients = [], [], [], []
    for tile in range(span.tiles):
        if span.opens(tile):
            if reset is not None:
                row = reset[:, span.chunk_of(tile)].view(-1, 1, 1)
                weights = [torch.where(row, i, w) for i, w in zip(initial[0], weights, strict=True)]
                surprise = [torch.where(row, i, s) for i, s in zip(initial[1], surprise, strict=True)]
            anchor = weights
        gradient = inner_gradient(x.k[:, tile], x.v[:, tile], anchor, residual_norm)
        starts_w.append(weights)
        starts_s.append(surprise)
        anchors.append(anchor)
        gradients.append(gradient)
        new_w, new_s = [], []
        for layer in range(depth):
            gate = gate_of(layer, tables)
            beta, f, m = (y[:, tile, gate, -1, None, None] for y in (tables.beta, tables.f, tables.m))
            a, e = gradient.inputs[layer], gradient.deltas[layer]
            w = torch.addcmul(weights[layer] * beta, surprise[layer], f)
            if towards is not None:
                w.addcmul_(towards[layer], 1 - beta)
            new_w.append(subtract_outer(w, tables.weight[:, tile, gate, -1], a, e))
            new_s.append(subtract_outer(surprise[layer] * m, tables.surprise[:, tile, gate, -1], a, e))
        weights, surprise = new_w, new_s
    return Written(
        [torch.stack(w, 1) for w in zip(*starts_w, strict=True)],
        [torch.stack(s, 1) for s in zip(*starts_s, strict=True)],
        anchors,
        _stack(gradients),
        weights,
        surprise,
    )


def subtract_outer(state: Tensor, coefficient: Tensor, a: Tensor, e: Tensor) -> Tensor:
    """state -= (coefficient o a)^T e, scaling whichever factor is narrower. coefficient [N, b]."""
    if a.shape[-1] <= e.shape[-1]:
        a = a * coefficient.unsqueeze(-1)
    else:
        e = e * coefficient.unsqueeze(-1)
    return state.baddbmm_(a.mT, e, alpha=-1)


def _stack(gradients: list[InnerGradient]) -> InnerGradient:
    def over_layers(name: str) -> list[Tensor]:
        return [torch.stack(xs, 1) for xs in zip(*(getattr(g, name) for g in gradients), strict=True)]

    norm = gradients[0].norm and tuple(torch.stack(xs, 1) for xs in zip(*(g.norm for g in gradients), strict=True))
    out = torch.stack([g.out for g in gradients], 1)
    return InnerGradient(*(over_layers(n) for n in ("inputs", "deltas", "pre", "back")), out, norm)


def scaled_matmul(coefficient: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """coefficient o (x w) [..., b, d_out], scaling whichever side is narrower. coefficient [..., b]."""
    if w.shape[-2] <= w.shape[-1]:
        return (x * coefficient.unsqueeze(-1)) @ w
    return (x @ w).mul_(coefficient.unsqueeze(-1))


def shared_matmul(x: Tensor, w: Tensor) -> Tensor:
    """x [N, G, b, d_in] with one w [N, d_in, d_out] for all tiles."""
    return (x.flatten(1, 2) @ w).unflatten(1, x.shape[1:3])


def read(x: SpanInputs, tables: Tables, written: Written, towards: Matrices | None) -> list[tuple[Tensor, Tensor]]:
    """Inputs and pre-activations (x_{l-1}, p_l) [N, G, b, .] of every memory layer at the per-token weights."""
    depth = len(written.weights)
    layers = []
    h = x.q
    for layer in range(depth):
        t = tables.at(gate_of(layer, tables))
        p = scaled_matmul(t.beta, h, written.weights[layer])
        p += scaled_matmul(t.f, h, written.surprise[layer])
        if towards is not None:
            p.addcmul_(shared_matmul(h, towards[layer]), (1 - t.beta).unsqueeze(-1))
        a, e = written.gradient.inputs[layer], written.gradient.deltas[layer]
        p -= (t.weight * (h @ a.mT)) @ e
        layers.append((h, p))
        if layer < depth - 1:
            h = gelu(p)
    return layers


def read_output(layers: list[tuple[Tensor, Tensor]], q: Tensor, residual_norm: bool) -> Tensor:
    """y [N, G, b, D] from the last pre-activation."""
    return output(layers[-1][1], q, residual_norm)
