"""The public attention of the variants: two contracts, several backends."""

from functools import partial

import torch
from torch import Tensor

from titans_pretrain.kernels.attention import flash, flex, reference, sdpa
from titans_pretrain.kernels.attention.checks import check_segment, check_window
from titans_pretrain.kernels.attention.libraries import LIBRARIES
from titans_pretrain.kernels.backends import Backend, autocast_dtype, choose, without_autocast

KeyValue = tuple[Tensor, Tensor]

# In the order in which "auto" tries them.
WINDOW = (
    *(
        Backend(x.name, partial(flash.window_attention, library=x), partial(flash.refuses_window, library=x))
        for x in LIBRARIES
    ),
    Backend("flex", flex.window_attention, flex.refuses),
    Backend("sdpa", sdpa.window_attention),
    Backend("reference", reference.window_attention),
)
SEGMENT = (
    *(
        Backend(x.name, partial(flash.segment_attention, library=x), partial(flash.refuses_segment, library=x))
        for x in LIBRARIES
    ),
    Backend("flex", flex.segment_attention, flex.refuses),
    Backend("sdpa", sdpa.segment_attention),
    Backend("reference", reference.segment_attention),
)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    positions: Tensor | None = None,
    persistent: KeyValue | None = None,
    tail: KeyValue | None = None,
    document_multiple: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, KeyValue]:
    """Each query sees itself, the `window - 1` keys before it and every persistent key (Titans, arXiv 2501.00663, 4.2).

    Args:
        q, k, v: [B, T, H, D], one dtype; rotary embedding, if any, is already applied.
        window: keys a query sees, itself included; None: all keys before it.
        positions: [B, T] int64, position of each token in its document, negative for padding. The query at index i sees
            the key at index j (tail keys have negative indices) iff `0 <= i - j < window` and
            `i - j <= max(positions[i], 0)`. None: no document starts here, and all of the tail belongs to this one.
            The flash backends need positions that count up by one within a document.
        persistent: (k, v), each [P, H, D]: visible to every query.
        tail: (k, v), each [B, S, H, D]: what came directly before this call, S <= window - 1. None: nothing.
        document_multiple: documents start this many tokens apart, or more. Bounds the sequences that a kernel of sequences has
            to plan for; the result is the same.
        backend: "auto"; on a GPU in half precision "flash_attn_3", "flash_attn_2", "flash_attn_4", "aten" (torch's own
            FlashAttention 2) and "flex" (torch's FlexAttention); "sdpa" (blocks of queries, O(T * window) time, memory linear
            in T, exact gradients by recomputation); "reference" (one dense mask, the oracle).

    Returns:
        y [B, T, H, D] and the tail of the next call: the last min(window - 1, S + T) keys and values (all of them when
        window is None). Any split of a sequence into calls gives the outputs and gradients of one call.

    Raises:
        ValueError: a shape, dtype or backend that does not fit; one line that names the argument.
    """
    check_window(q, k, v, window, positions, persistent, tail, document_multiple)
    dtype = _compute_dtype(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if tail is not None:
        k, v = (torch.cat((old.to(dtype), new), 1) for old, new in zip(tail, (k, v), strict=True))
    total = k.shape[1]
    arguments = dict(
        q=q, k=k, v=v, window=total if window is None else min(window, total),
        limit=None if positions is None else positions.clamp(min=0), persistent=_cast(persistent, dtype),
        document_multiple=document_multiple,
    )  # fmt: skip
    with without_autocast(q):
        y = choose("sliding_window_attention", WINDOW, backend, arguments).run(**arguments)
    kept = total if window is None else min(window - 1, total)
    if kept < total:  # cloned: a view would keep the whole sequence alive inside the state
        k, v = k[:, total - kept :].clone(), v[:, total - kept :].clone()
    return y, (k, v)


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    *,
    persistent: KeyValue | None = None,
    context: KeyValue | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over [persistent | context | retrieved memory | segment] (Titans, arXiv 2501.00663, equation 22), causal:
    row t of the segment sees k_j and memory_k_j for j <= t only, where the paper's full block would leak the future.

    Args:
        q: [B, Tq, H, D]: the last Tq tokens of the segment.
        k, v: [B, S, H, D]: the segment so far, S >= Tq.
        memory_k, memory_v: [B, S, H, D]: what was retrieved for each of its tokens, or None.
        persistent: (k, v), each [P, H, D]: visible to every row.
        context: (k, v), each [B, N, H, D]: visible to every row of its sample.
        lengths: [B] int64, how many of the S tokens, the last ones, are the sample's own, Tq or more; None: all. What stands
            before them is not seen. "sdpa" and "reference" only.
        backend: one of sliding_window_attention's.

    Returns:
        y [B, Tq, H, D].

    Raises:
        ValueError: a shape, dtype or backend that does not fit; one line that names the argument.
    """
    check_segment(q, k, v, memory_k, memory_v, persistent, context, lengths)
    dtype = _compute_dtype(q)
    arguments = dict(
        q=q.to(dtype), k=k.to(dtype), v=v.to(dtype), memory=None if memory_k is None else _cast((memory_k, memory_v), dtype),
        persistent=_cast(persistent, dtype), context=_cast(context, dtype), lengths=lengths,
    )  # fmt: skip
    with without_autocast(q):
        return choose("segment_attention", SEGMENT, backend, arguments).run(**arguments)


def _compute_dtype(q: Tensor) -> torch.dtype:
    """Under autocast its own, as the stock attention has it, and alike in the backward pass."""
    return autocast_dtype(q) or q.dtype if q.dtype == torch.float32 else q.dtype


def _cast(pair: KeyValue | None, dtype: torch.dtype) -> KeyValue | None:
    return None if pair is None else (pair[0].to(dtype), pair[1].to(dtype))
