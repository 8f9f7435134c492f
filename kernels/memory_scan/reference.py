"""The oracle: the recurrence token by token, every inner gradient by automatic differentiation.

Slow on purpose, and written from the update rule alone: it shares no formula with the other backends.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from titans_pretrain.kernels.memory_scan.hidden_split import HiddenSplit
from titans_pretrain.kernels.memory_scan.options import ScanOptions
from titans_pretrain.kernels.memory_scan.state import MemoryState


def layers(weights, x: Tensor) -> Tensor:
    """z of one head for one token. x [D], weights over L of [d_in, d_out]."""
    for w in weights[:-1]:
        x = F.gelu(x @ w, approximate="tanh")
    return x @ weights[-1]


def memory(weights, x: Tensor, residual_norm: bool) -> Tensor:
    """M(x) of one head for one token."""
    z = layers(weights, x)
    return x + F.layer_norm(z, z.shape, eps=1e-6) if residual_norm else z


def inner_step(weights, key: Tensor, value: Tensor, options: ScanOptions) -> tuple[Tensor, ...]:
    """u of one head for one token: the gradient of |M(k) - v|^2, damped."""

    def loss(weights):
        return (memory(weights, key, options.residual_norm) - value).square().sum()

    u = grad(loss)(weights)
    if not (options.residual_norm and options.damping):
        return u
    variance = layers(weights, key).var(correction=0) + 1e-6  # LayerNorm's own epsilon
    phi = variance / (variance + options.damping * weights[-1].shape[0])
    return tuple(phi * x for x in u)


def over_heads(f):
    """f of one head for all of a batch, [B, H, ...]."""
    return vmap(vmap(f))


def read(q: Tensor, state: MemoryState, *, residual_norm: bool, **_) -> Tensor:
    """See memory_read; arguments are validated there."""
    x = q.to(state.weights[0].dtype)
    one = over_heads(lambda weights, x: memory(weights, x, residual_norm))
    return torch.stack([one(state.weights, x[:, t]) for t in range(q.shape[1])], 1).to(q.dtype)


def scan(
    q: Tensor, k: Tensor, v: Tensor, forget: Tensor, momentum: Tensor, lr: Tensor, state: MemoryState, *, options: ScanOptions,
    initial_state: MemoryState | None, reset: Tensor | None = None, **_,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """See memory_scan, and with one token memory_step; arguments are validated there."""
    dtype, depth = state.weights[0].dtype, state.depth
    out = q.dtype
    q, k, v, forget, momentum, lr = (x.to(dtype) for x in (q, k, v, forget, momentum, lr))
    gradient = over_heads(lambda weights, key, value: inner_step(weights, key, value, options))
    weights, surprise = state.weights, state.surprise
    anchor, offset = state.anchor or weights, state.offset
    outputs = []
    for t in range(q.shape[1]):
        if offset == 0:
            if reset is not None:
                row = reset[:, (t + state.offset) // options.chunk_size].view(-1, 1, 1, 1)
                weights = tuple(torch.where(row, i, w) for i, w in zip(initial_state.weights, weights, strict=True))
                surprise = tuple(torch.where(row, i, s) for i, s in zip(initial_state.surprise, surprise, strict=True))
            anchor = weights
        u = gradient(anchor, k[:, t], v[:, t])
        alpha, eta, theta = (
            [g[:, t, :, min(i, g.shape[-1] - 1), None, None] for i in range(depth)] for g in (forget, momentum, lr)
        )
        surprise = tuple(eta[i] * surprise[i] - theta[i] * u[i] for i in range(depth))
        towards = initial_state.weights if options.forget_to == "initial" else (0.0,) * depth
        weights = tuple(towards[i] + (1 - alpha[i]) * (weights[i] - towards[i]) + surprise[i] for i in range(depth))
        outputs.append(over_heads(lambda w, x: memory(w, x, options.residual_norm))(weights, q[:, t]))
        offset = (offset + 1) % options.chunk_size
    return torch.stack(outputs, 1).to(out), MemoryState(weights, surprise, anchor if offset else None, offset)


def refuses(*, state: MemoryState, hidden_split: HiddenSplit, **_) -> str | None:
    if state.ragged:
        return "state: its rows stand at offsets of their own"
    return "hidden_split: it holds a whole memory on one rank" if hidden_split.ranks > 1 else None
