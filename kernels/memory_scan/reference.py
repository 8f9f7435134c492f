"""The oracle: the recurrence token by token, every inner gradient by automatic differentiation.

Slow on purpose, and written from the update rule alone: it shares no formula with the other backends.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from titans_pretrain.kernels.memory_scan.hidden_split import HiddenGroup
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


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor,
    momentum: Tensor,
    lr: Tensor,
    state: MemoryState,
    *,
    chunk_size: int,
    residual_norm: bool,
    damping: float,
    forget_to: str,
    reset: Tensor | None,
    initial_state: MemoryState | None,
    checkpoint_every: int | None = None,
    hidden_group: HiddenGroup = None,
) -> tuple[Tensor, MemoryState]:
    """See memory_scan; arguments are validated there. checkpoint_every is of no use here."""
    if hidden_group is not None:
        raise ValueError("backend=reference holds a whole memory on one rank; with hidden_group use backend=chunked")
    depth = state.depth

    def loss(weights, key, value):
        return (memory(weights, key, residual_norm) - value).square().sum()

    over_heads = lambda f: vmap(vmap(f))  # noqa: E731  batch, then heads

    def damped(weights, key, value):
        u = grad(loss)(weights, key, value)
        if not (residual_norm and damping):
            return u
        variance = layers(weights, key).var(correction=0) + 1e-6  # LayerNorm's own epsilon
        phi = variance / (variance + damping * weights[-1].shape[0])
        return tuple(phi * x for x in u)

    gradient = over_heads(damped)
    read = over_heads(lambda weights, x: memory(weights, x, residual_norm))

    weights, surprise = state.weights, state.surprise
    anchor, offset = state.anchor or weights, state.offset
    outputs = []
    for t in range(q.shape[1]):
        if offset == 0:
            if reset is not None:
                row = reset[:, (t + state.offset) // chunk_size].view(-1, 1, 1, 1)
                weights = tuple(torch.where(row, i, w) for i, w in zip(initial_state.weights, weights, strict=True))
                surprise = tuple(torch.where(row, i, s) for i, s in zip(initial_state.surprise, surprise, strict=True))
            anchor = weights
        u = gradient(anchor, k[:, t], v[:, t])
        alpha, eta, theta = (
            [g[:, t, :, min(i, g.shape[-1] - 1), None, None] for i in range(depth)] for g in (forget, momentum, lr)
        )
        surprise = tuple(eta[i] * surprise[i] - theta[i] * u[i] for i in range(depth))
        towards = initial_state.weights if forget_to == "initial" else (0.0,) * depth
        weights = tuple(towards[i] + (1 - alpha[i]) * (weights[i] - towards[i]) + surprise[i] for i in range(depth))
        outputs.append(read(weights, q[:, t]))
        offset = (offset + 1) % chunk_size
    return torch.stack(outputs, 1), MemoryState(weights, surprise, anchor if offset else None, offset)
