"""One token for decoding, and reading without writing: plain operations, differentiable by autograd."""

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunked.network import Network, inner_gradient, memory_network
from titans_pretrain.kernels.memory_scan.hidden_split import HiddenSplit
from titans_pretrain.kernels.memory_scan.options import ScanOptions
from titans_pretrain.kernels.memory_scan.state import MemoryState


def read(q: Tensor, state: MemoryState, *, residual_norm: bool, hidden_split: HiddenSplit) -> Tensor:
    """See memory_read; arguments are validated there."""
    dtype = state.weights[0].dtype
    y = memory_network(q.transpose(1, 2).to(dtype), state.weights, residual_norm, hidden_split)
    return y.transpose(1, 2).to(q.dtype)


def step(
    q: Tensor, k: Tensor, v: Tensor, forget: Tensor, momentum: Tensor, lr: Tensor, state: MemoryState, *, options: ScanOptions,
    initial_state: MemoryState | None, hidden_split: HiddenSplit,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """See memory_step; arguments are validated there."""
    dtype = state.weights[0].dtype
    key, value = (x.transpose(1, 2).to(dtype) for x in (k, v))  # [B, H, 1, D]
    anchor = state.anchor or state.weights
    gradient = inner_gradient(key, value, anchor, Network.of(options, anchor, hidden_split))
    gates = [hidden_split.copy(g) for g in (forget, momentum, lr)]
    weights, surprise = [], []
    for i in range(state.depth):
        alpha, eta, theta = (g[:, 0, :, min(i, g.shape[-1] - 1), None, None].to(dtype) for g in gates)
        s = eta * state.surprise[i] - theta * (gradient.inputs[i].mT @ gradient.deltas[i])
        w = (1 - alpha) * state.weights[i] + s
        if options.forget_to == "initial":
            w = w + alpha * initial_state.weights[i]
        weights.append(w)
        surprise.append(s)
    offset = (state.offset + 1) % options.chunk_size
    if state.ragged:
        opens = (offset == 0)[:, None, None, None]  # the next token opens a chunk
        anchor = [torch.where(opens, w, a) for w, a in zip(weights, anchor, strict=True)]
    new = MemoryState(tuple(weights), tuple(surprise), tuple(anchor) if state.ragged or offset else None, offset)
    return read(q, new, residual_norm=options.residual_norm, hidden_split=hidden_split), new
