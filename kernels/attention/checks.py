"""What the attentions refuse: a ValueError of one line each."""

import torch
from torch import Tensor

from titans_pretrain.kernels.backends import values_at_hand

KeyValue = tuple[Tensor, Tensor]


def check_window(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, positions: Tensor | None, persistent: KeyValue | None,
    tail: KeyValue | None, document_multiple: int = 1,
) -> None:  # fmt: skip
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
    if document_multiple < 1:
        raise ValueError(f"document_multiple must be 1 or more, got {document_multiple}")
    if positions is not None and values_at_hand(positions):
        _check_documents(positions, document_multiple)
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


def _check_documents(positions: Tensor, multiple: int) -> None:
    row = torch.arange(positions.shape[1], device=positions.device)
    last = torch.where(positions == 0, row, -multiple).cummax(1).values
    if ((positions[:, 1:] == 0) & (row[1:] - last[:, :-1] < multiple)).any():
        raise ValueError(f"positions has documents that start less than document_multiple={multiple} tokens apart")


def check_segment(
    q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor | None, memory_v: Tensor | None, persistent: KeyValue | None,
    context: KeyValue | None, lengths: Tensor | None = None,
) -> None:  # fmt: skip
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B, Tq, H, D] with no empty dimension, got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"q must be a floating-point tensor, got {q.dtype}")
    batch, rows, heads, size = q.shape
    if (memory_k is None) != (memory_v is None):
        raise ValueError("memory_k and memory_v must be given together, or both be None")
    for name, x in (("k", k), ("v", v), ("memory_k", memory_k), ("memory_v", memory_v)):
        if x is not None and (x.shape != (batch, k.shape[1], heads, size) or x.dtype != q.dtype):
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype}; it must be [{batch}, S, {heads}, {size}] {q.dtype}, S as in k"
            )
    if lengths is not None and (lengths.shape != (batch,) or lengths.dtype != torch.int64):
        raise ValueError(f"lengths is {tuple(lengths.shape)} {lengths.dtype}; it must be {(batch,)} torch.int64")
    if k.shape[1] < rows:
        raise ValueError(f"k holds {k.shape[1]} tokens of the segment; q, its last tokens, cannot hold {rows}")
    for name, pair, shape in (("persistent", persistent, (heads, size)), ("context", context, (batch, heads, size))):
        for x in pair or ():
            if x.dim() != len(shape) + 1 or (*x.shape[:-3], *x.shape[-2:]) != shape or x.shape != pair[0].shape:
                expected = "[P, H, D]" if name == "persistent" else "[B, N, H, D]"
                raise ValueError(f"{name} is {tuple(x.shape)}; both must be {expected} with H, D (and B) as in q")
