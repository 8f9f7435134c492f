"""The scan as torch.library operators: torch.compile traces over them, and they are differentiable once.

Saved for the backward pass: what the call was given, its inner deltas, and the state at the start of every group but the first. All
through autograd's own saved tensors, so that activation checkpointing and torch's hooks see them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunked.walk import States
from titans_pretrain.kernels.memory_scan.triton.call import Call, Tokens
from titans_pretrain.kernels.memory_scan.triton.forward import Results, forward


def _arguments(
    tokens: Sequence[Tensor], states: Sequence[Tensor], reset: Tensor | None, depth: int, offset: int, chunk_size: int,
    residual_norm: bool, damping: float, to_initial: bool, checkpoint_every: int | None,
) -> tuple[Call, Tokens, States]:  # fmt: skip
    """tokens: q, k, v, forget, momentum, lr. states: weights, surprise, then the anchor if offset > 0, then the initial weights and
    surprise if there are any; over the layers."""
    x = Tokens(*tokens)
    found = [tuple(states[i : i + depth]) for i in range(0, len(states), depth)]
    anchor = found.pop(2) if offset else None
    given = States(found[0], found[1], anchor, *(found[2:] or (None, None)))
    call = Call.of(
        x, given.weights, offset, chunk_size, residual_norm, damping, to_initial, reset is not None, checkpoint_every
    )
    return call, x, given


@torch.library.custom_op("titans_pretrain::memory_scan", mutates_args=())
def memory_scan(
    tokens: Sequence[Tensor], states: Sequence[Tensor], reset: Tensor | None, depth: int, offset: int, chunk_size: int,
    residual_norm: bool, damping: float, to_initial: bool, checkpoint_every: int | None, differentiable: bool,
) -> list[Tensor]:  # fmt: skip
    """forward.Results, flat."""
    call, x, given = _arguments(
        tokens, states, reset, depth, offset, chunk_size, residual_norm, damping, to_initial, checkpoint_every
    )
    return forward(call, x, given, reset, differentiable).flat()


@memory_scan.register_fake
def _(
    tokens,
    states,
    reset,
    depth,
    offset,
    chunk_size,
    residual_norm,
    damping,
    to_initial,
    checkpoint_every,
    differentiable,
):
    call, x, _ = _arguments(
        tokens, states, reset, depth, offset, chunk_size, residual_norm, damping, to_initial, checkpoint_every
    )
    return Results.empty(call, x, differentiable).flat()
