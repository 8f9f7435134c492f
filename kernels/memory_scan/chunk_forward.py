"""One span of the chunked scan, forward: a sequential write of the states, then one parallel read of all tiles.

Layout: N = batch * heads, G tiles, b tokens per tile; tokens [N, G, b, .]. The state of a memory layer is one matrix X
[N, K * d_in, d_out] of K slots, stacked by rows: W and S, or W - W_init, S and W_init when forgetting goes there. With the tables
of gates.py and the write's factors a [b, d_in], e [b, d_out]:

    X+ = carried X - [last o a]^T e      on the first two slots
    x_t W_t = [read_t o x_t] X - [(C o x a^T) e]_t
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.gates import Tables, decay_tables
from titans_pretrain.kernels.memory_scan.network import InnerGradient, gelu, inner_gradient
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
        rows = [span_rows(span, x).to(dtype) for x in (q, k, v, forget, momentum, lr)]
        return SpanInputs(*(x.contiguous() for x in rows[:3]), *(x.mT.contiguous() for x in rows[3:]))

    def tables(self, slots: int) -> Tables:
        return decay_tables(self.forget, self.momentum, self.lr, slots)


def span_rows(span: Span, x: Tensor) -> Tensor:
    """[B, T, H, .] -> [N, G, b, .] of the span's tokens."""
    x = x[:, span.start : span.stop].unflatten(1, (span.tiles, span.tile))
    return x.permute(0, 3, 1, 2, 4).flatten(0, 1)


@dataclass
class Written:
    """What writing a span leaves."""

    states: Matrices  # at the tiles' starts [N, G, K * d_in, d_out]
    anchors: list[Matrices]  # per tile, [N, d_in, d_out]
    gradient: InnerGradient  # fields stacked over the tiles, [N, G, b, .]
    last: Matrices  # the state after the span


def gate_of(layer: int, tables: Tables) -> int:
    """Index of the gate that drives a memory layer: its own, or the shared one."""
    return min(layer, tables.beta.shape[-2] - 1)


def weights(state: Tensor, slots: int) -> Tensor:
    """W [N, d_in, d_out] of a state."""
    first, _, *towards = state.chunk(slots, 1)
    return first + towards[0] if towards else first


def scale(x: Tensor, coefficients: Tensor) -> Tensor:
    """Copies of x [..., b, d], one per coefficient [..., b, n], scaled and side by side: [..., b, n * d]."""
    return (x.unsqueeze(-2) * coefficients.unsqueeze(-1)).flatten(-2)


def carry(state: Tensor, slots: int, coefficients: Tensor) -> Tensor:
    """The state after a tile that writes nothing. coefficients [N, 3]: beta, f, m at the tile's end."""
    beta, f, m = coefficients[..., None, None].unbind(1)
    new = torch.empty_like(state)
    (first, surprise, *rest), (new_first, new_surprise, *new_rest) = state.chunk(slots, 1), new.chunk(slots, 1)
    torch.mul(first, beta, out=new_first).addcmul_(surprise, f)
    torch.mul(surprise, m, out=new_surprise)
    for x, y in zip(rest, new_rest, strict=True):
        y.copy_(x)
    return new


def write(
    span: Span, x: SpanInputs, tables: Tables, state: Matrices, anchor: Matrices | None, *, residual_norm: bool,
    reset: Tensor | None, initial: Matrices | None,
) -> Written:  # fmt: skip
    """Walk the tiles. anchor: of the chunk that the span continues; reset: [N, chunks of the call]; initial: a state."""
    slots = tables.read.shape[-1]
    states, anchors, gradients = [], [], []
    for tile in range(span.tiles):
        if span.opens(tile):
            if reset is not None:
                row = reset[:, span.chunk_of(tile)].view(-1, 1, 1)
                state = [torch.where(row, i, s) for i, s in zip(initial, state, strict=True)]
            anchor = [weights(s, slots) for s in state]
        gradient = inner_gradient(x.k[:, tile], x.v[:, tile], anchor, residual_norm)
        states.append(state)
        anchors.append(anchor)
        gradients.append(gradient)
        new = []
        for layer, s in enumerate(state):
            gate = gate_of(layer, tables)
            a, e = gradient.inputs[layer], gradient.deltas[layer]
            s = carry(s, slots, tables.carry[:, tile, gate])
            s[:, : 2 * a.shape[-1]].baddbmm_(scale(a, tables.last[:, tile, gate]).mT, e, alpha=-1)
            new.append(s)
        state = new
    return Written([torch.stack(s, 1) for s in zip(*states, strict=True)], anchors, _stack(gradients), state)


def _stack(gradients: list[InnerGradient]) -> InnerGradient:
    def over_layers(name: str) -> list[Tensor]:
        return [torch.stack(xs, 1) for xs in zip(*(getattr(g, name) for g in gradients), strict=True)]

    norm = gradients[0].norm and tuple(torch.stack(xs, 1) for xs in zip(*(g.norm for g in gradients), strict=True))
    out = torch.stack([g.out for g in gradients], 1)
    return InnerGradient(*(over_layers(n) for n in ("inputs", "deltas", "pre", "back")), out, norm)


def read(q: Tensor, tables: Tables, written: Written) -> list[tuple[Tensor, Tensor]]:
    """Inputs and pre-activations [N, G, b, .] of every memory layer at the per-token weights; the last one is z."""
    layers, h = [], q
    for layer, state in enumerate(written.states):
        gate = gate_of(layer, tables)
        a, e = written.gradient.inputs[layer], written.gradient.deltas[layer]
        p = scale(h, tables.read[:, :, gate]) @ state
        p -= (tables.weight[:, :, gate] * (h @ a.mT)) @ e
        layers.append((h, p))
        if layer < len(written.states) - 1:
            h = gelu(p)
    return layers
