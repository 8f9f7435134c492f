"""The scan in Triton kernels, as one differentiable operation."""

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunked.walk import States
from titans_pretrain.kernels.memory_scan.hidden_split import HiddenSplit
from titans_pretrain.kernels.memory_scan.options import ScanOptions
from titans_pretrain.kernels.memory_scan.state import MemoryState
from titans_pretrain.kernels.memory_scan.triton.operators import memory_scan


def scan(
    q: Tensor, k: Tensor, v: Tensor, forget: Tensor, momentum: Tensor, lr: Tensor, state: MemoryState, *, options: ScanOptions,
    reset: Tensor | None, initial_state: MemoryState | None, checkpoint_every: int | None, hidden_split: HiddenSplit,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """See memory_scan; arguments are validated there, and by entry.py."""
    initial = (None, None) if initial_state is None else (initial_state.weights, initial_state.surprise)
    states = States(state.weights, state.surprise, state.anchor, *initial).flat()
    tokens = [x.contiguous() for x in (q, k, v, forget, momentum, lr)]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (*tokens, *states))
    y, *out = memory_scan(
        tokens, states, reset, state.depth, state.offset, options.chunk_size, options.residual_norm, options.damping,
        options.forget_to == "initial", checkpoint_every, differentiable,
    )  # fmt: skip
    offset = (state.offset + q.shape[1]) % options.chunk_size
    depth = state.depth
    weights, surprise, anchor = (tuple(out[i * depth : (i + 1) * depth]) for i in range(3))
    return y, MemoryState(weights, surprise, anchor if offset else None, offset)
