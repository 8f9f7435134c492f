"""What memory_scan, memory_step and memory_read refuse: a ValueError of one line each."""

import math

import torch
from torch import Tensor

from titans_pretrain.kernels.backends import values_at_hand
from titans_pretrain.kernels.memory_scan.options import ScanOptions
from titans_pretrain.kernels.memory_scan.state import MemoryState


def check_scan(
    q: Tensor, k: Tensor, v: Tensor, forget: Tensor, momentum: Tensor, lr: Tensor, state: MemoryState, options: ScanOptions,
    reset: Tensor | None, initial_state: MemoryState | None, checkpoint_every: int | None,
) -> None:  # fmt: skip
    batch, tokens, heads, dim = _check_queries(q)
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, but q is {tuple(q.shape)}; they must agree")
    depth = state.depth
    for name, x in (("forget", forget), ("momentum", momentum), ("lr", lr)):
        if x.shape[:-1] != q.shape[:-1] or x.shape[-1] not in (1, depth):
            raise ValueError(
                f"{name} is {tuple(x.shape)}; for q {tuple(q.shape)} and {depth} memory layers it must be "
                f"{(batch, tokens, heads, depth)} or {(batch, tokens, heads, 1)}"
            )
    if not forget.shape == momentum.shape == lr.shape:
        raise ValueError(
            f"forget {tuple(forget.shape)}, momentum {tuple(momentum.shape)} and lr {tuple(lr.shape)} must have one shape"
        )
    _check_range("forget", forget, 1.0)
    _check_range("momentum", momentum, 1.0)
    _check_range("lr", lr, math.inf)
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be positive or None, got {checkpoint_every}")
    if initial_state is None and (reset is not None or options.forget_to == "initial"):
        raise ValueError(f"{'reset' if reset is not None else 'forget_to=initial'} needs initial_state")
    dtype = state.weights[0].dtype
    check_state("state", state, batch, heads, dim, depth, dtype)
    if not state.ragged and state.offset >= options.chunk_size:
        raise ValueError(
            f"the state has read {state.offset} tokens of its chunk, more than chunk_size={options.chunk_size} holds"
        )
    if state.ragged and state.offset.shape != (batch,):
        raise ValueError(f"offset is {tuple(state.offset.shape)}; it must be one for each of the {batch} rows")
    if initial_state is not None:
        check_state("initial_state", initial_state, batch, heads, dim, depth, dtype)
        if initial_state.ragged or initial_state.offset:
            raise ValueError("initial_state must stand at a chunk's start (offset 0); use initial_state.opened()")
    if reset is not None:
        chunks = -(-(state.offset + tokens) // options.chunk_size)
        if reset.dtype != torch.bool or reset.shape != (batch, chunks):
            raise ValueError(
                f"reset must be bool {(batch, chunks)} (batch, chunks), got {reset.dtype} {tuple(reset.shape)}"
            )
        if state.offset and values_at_hand(reset) and reset[:, 0].any():
            raise ValueError(
                f"reset in a half-read chunk (offset {state.offset}): documents start at chunk starts only"
            )


def check_read(q: Tensor, state: MemoryState) -> None:
    batch, _, heads, dim = _check_queries(q)
    check_state("state", state, batch, heads, dim, state.depth, state.weights[0].dtype)


def check_state(
    name: str, state: MemoryState, batch: int, heads: int, dim: int, depth: int, dtype: torch.dtype
) -> None:
    if state.batch not in (1, batch) or state.depth != depth:
        raise ValueError(f"{name} has batch {state.batch} and depth {state.depth}; expected 1 or {batch}, and {depth}")
    width = dim
    anchor = state.anchor or state.weights
    for i, (w, s, a) in enumerate(zip(state.weights, state.surprise, anchor, strict=True)):
        last = i == depth - 1
        if w.shape[1:3] != (heads, width) or not w.shape == s.shape == a.shape or (last and w.shape[3] != dim):
            raise ValueError(
                f"{name}: memory layer {i} has weights {tuple(w.shape)}, surprise {tuple(s.shape)} and anchor {tuple(a.shape)}; "
                f"expected [{batch}, {heads}, {width}, {dim if last else 'hidden'}]"
            )
        for kind, x in (("weights", w), ("surprise", s), ("anchor", a)):
            if x.dtype not in (torch.float32, torch.float64) or x.dtype != dtype:
                raise ValueError(
                    f"{name}: the {kind} of memory layer {i} are {x.dtype}; all states are of one dtype, float32 (float64 in tests)"
                )
        width = w.shape[3]


def _check_queries(q: Tensor) -> tuple[int, ...]:
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"q must be a floating point [B, T, H, D], got {q.dtype} {tuple(q.shape)}")
    if q.shape[1] == 0:
        raise ValueError("memory_scan needs at least one token, got T=0")
    return tuple(q.shape)


def _check_range(name: str, gate: Tensor, high: float) -> None:
    """0 <= gate <= high and not infinite, where that can be told without waiting for a device. NaN passes: a model that has diverged
    is for whoever looks at its loss to report."""
    if not gate.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {gate.dtype}")
    if not values_at_hand(gate):
        return
    least, most = (x.item() for x in torch.aminmax(gate.detach()))
    if least < 0 or most > high or most == math.inf:
        legal = "0 or more and finite" if high == math.inf else f"in [0, {high:g}]"
        raise ValueError(f"{name} must be {legal}, got values from {least:g} to {most:g}")
