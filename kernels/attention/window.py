"""Causal sliding-window attention with a key/value tail, document boundaries and persistent keys."""

import torch
from torch import Tensor

from titans_pretrain.kernels.attention.reference import dense_attention
from titans_pretrain.kernels.attention.sdpa import blocked_attention

_BACKENDS = {"auto": blocked_attention, "sdpa": blocked_attention, "reference": dense_attention}

KeyValue = tuple[Tensor, Tensor]


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    positions: Tensor | None = None,
    persistent: KeyValue | None = None,
    tail: KeyValue | None = None,
    backend: str = "auto",
) -> tuple[Tensor, KeyValue]:
    """Each query sees itself, the `window - 1` keys before it and every persistent key (Titans, arXiv 2501.00663, 4.2).

    Args:
        q, k, v: [B, T, H, D], one dtype; rotary embedding, if any, is already applied.
        window: keys a query sees, itself included; None: all keys before it.
        positions: [B, T] int64, position of each token in its document, negative for padding. The query at index i sees
            the key at index j (tail keys have negative indices) iff `0 <= i - j < window` and
            `i - j <= max(positions[i], 0)`. None: no document starts here, and all of the tail belongs to this one.
        persistent: (k, v), each [P, H, D]: visible to every query.
        tail: (k, v), each [B, S, H, D]: what came directly before this call, S <= window - 1. None: nothing.
        backend: "sdpa" (also "auto"): blocks of queries, O(T * window) time, memory linear in T, exact gradients by
            recomputation; "reference": one dense mask, the oracle.

    Returns:
        y [B, T, H, D] and the tail of the next call: the last min(window - 1, S + T) keys and values (all of them when
        window is None). Any split of a sequence into calls gives the outputs and gradients of one call.

    Raises:
        ValueError: a shape, dtype or name that does not fit; one line that names the argument.
    """
    _check(q, k, v, window, positions, persistent, tail, backend)
    device_type = q.device.type
    dtype = q.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)  # as the stock attention does, and alike in the backward pass
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if tail is not None:
        k, v = (torch.cat((old.to(dtype), new), 1) for old, new in zip(tail, (k, v), strict=True))
    if persistent is not None:
        persistent = (persistent[0].to(dtype), persistent[1].to(dtype))
    limit = None if positions is None else positions.clamp(min=0)
    total = k.shape[1]
    y = _BACKENDS[backend](q, k, v, total if window is None else min(window, total), limit, persistent)
    kept = total if window is None else min(window - 1, total)
    if kept < total:  # cloned: a view would keep the whole sequence alive inside the state
        k, v = k[:, total - kept :].clone(), v[:, total - kept :].clone()
    return y, (k, v)


def _check(q, k, v, window, positions, persistent, tail, backend) -> None:
    if backend not in _BACKENDS:
        raise ValueError(f"attention backend is {backend!r}; legal are {', '.join(_BACKENDS)}")
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B, T, H, D] with no empty dimension, got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"q must be a floating-point tensor, got {q.dtype}")
    batch, tokens, heads, size = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}; it must be as q, {tuple(q.shape)} {q.dtype}")
    if window is not None and window < 1:
        raise ValueError(f"window must be 1 or more, or None for full attention, got {window}")
    if positions is not None and (positions.shape != (batch, tokens) or positions.dtype != torch.int64):
        raise ValueError(
            f"positions is {tuple(positions.shape)} {positions.dtype}; it must be {(batch, tokens)} torch.int64"
        )
    if persistent is not None:
        for name, x in zip(("k", "v"), persistent, strict=True):
            if x.dim() != 3 or x.shape[1:] != (heads, size) or x.shape[0] != persistent[0].shape[0]:
                raise ValueError(f"persistent {name} is {tuple(x.shape)}; both must be [P, {heads}, {size}]")
    if tail is not None:
        for name, x in zip(("k", "v"), tail, strict=True):
            if x.dim() != 4 or (x.shape[0], *x.shape[2:]) != (batch, heads, size) or x.shape != tail[0].shape:
                raise ValueError(f"tail {name} is {tuple(x.shape)}; both must be [{batch}, S, {heads}, {size}]")
        if window is not None and tail[0].shape[1] > window - 1:
            raise ValueError(f"tail holds {tail[0].shape[1]} keys; a window of {window} sees at most {window - 1}")
