"""The scan as torch.library operators: torch.compile traces over them, and they are differentiable once.

Saved for the backward pass: what the call was given, its inner deltas, and the state at the start of every group but the first. All
through autograd's own saved tensors, so that activation checkpointing and torch's hooks see them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunked.walk import States
from titans_pretrain.kernels.memory_scan.triton.backward import backward
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
    options = (depth, offset, chunk_size, residual_norm, damping, to_initial, checkpoint_every)
    call, x, given = _arguments(tokens, states, reset, *options)
    with torch.cuda.device_of(x.q):
        return forward(call, x, given, reset, differentiable).flat()


@memory_scan.register_fake
def _(tokens, states, reset, *options):
    *rest, differentiable = options
    call, x, _ = _arguments(tokens, states, reset, *rest)
    return Results.empty(call, x, differentiable).flat()


@torch.library.custom_op("titans_pretrain::memory_scan_backward", mutates_args=())
def memory_scan_backward(
    tokens: Sequence[Tensor], states: Sequence[Tensor], reset: Tensor | None, saved: Sequence[Tensor], d_y: Tensor,
    d_states: Sequence[Tensor], depth: int, offset: int, chunk_size: int, residual_norm: bool, damping: float, to_initial: bool,
    checkpoint_every: int | None,
) -> list[Tensor]:  # fmt: skip
    """saved: e, n, rstd and checkpoints of forward.Results. d_states: gradients of its weights, surprise and anchor. Gradients of
    tokens and states, in their dtypes."""
    options = (depth, offset, chunk_size, residual_norm, damping, to_initial, checkpoint_every)
    call, x, given = _arguments(tokens, states, reset, *options)
    by_layers = [tuple(d_states[i : i + depth]) for i in range(0, len(d_states), depth)]
    d_after = States(by_layers[0], by_layers[1], by_layers[2] if call.ends_half else None, None, None)
    with torch.cuda.device_of(x.q):
        d_tokens, d_given = backward(call, x, given, reset, Results(d_y, [], [], [], *saved), d_y, d_after)
    return [d.to(t.dtype) for d, t in zip((*d_tokens, *d_given.flat()), (*tokens, *states), strict=True)]


@memory_scan_backward.register_fake
def _(tokens, states, reset, saved, d_y, d_states, *options):
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (*tokens, *states)]


def _setup_context(ctx, inputs, output):
    tokens, states, reset, *ctx.options, differentiable = inputs
    assert differentiable
    ctx.depth, ctx.states = ctx.options[0], len(states)
    ctx.outputs = len(output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tokens, *states, *output[-4:], *(() if reset is None else (reset,)))


def _backward(ctx, d_out):
    count = 6 + ctx.states
    tensors = ctx.saved_tensors  # once: activation checkpointing unpacks only once
    tokens, states, saved = tensors[:6], tensors[6:count], tensors[count : count + 4]
    reset = tensors[count + 4] if len(tensors) > count + 4 else None
    d_y, *d_states = d_out[:-4]
    if d_y is None:
        d_y = torch.zeros_like(tokens[0])
    d_states = [torch.zeros_like(states[i % (2 * ctx.depth)]) if d is None else d for i, d in enumerate(d_states)]
    d = memory_scan_backward(tokens, states, reset, saved, d_y.contiguous(), d_states, *ctx.options)
    return (d[:6], d[6:], None, *(None for _ in range(8)))


memory_scan.register_autograd(_backward, setup_context=_setup_context)
