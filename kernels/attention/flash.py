"""Both contracts over a library of flash kernels: the keys in parts, each by one call, merged (merged.py)."""

import torch
from torch import Tensor

from titans_pretrain.kernels.attention.documents import alone, document_span, most_sequences
from titans_pretrain.kernels.attention.merged import Library, Span, merged_attention

KeyValue = tuple[Tensor, Tensor]

# Sequences are counted by their bound, and the empty ones cost too: a block of each kernel for 128 tokens of the longest there could
# be, and 128 rows of float32 in the backward pass. Beyond these bounds documents are for a backend that masks.
MOST_BLOCKS = 2**18
TOKENS_PER_SEQUENCE = 32
_ROWS = 128


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, limit: Tensor | None, persistent: KeyValue | None,
    document_multiple: int, library: Library,
) -> Tensor:  # fmt: skip
    """q [B, T, H, D]; k, v [B, S + T, H, D], whose first S are the tail; limit [B, T] or None: how far back, at most,
    each query sees; persistent: pair of [P, H, D] or None. Returns [B, T, H, D]. Memory linear in T."""
    batch, tokens = q.shape[:2]
    total = k.shape[1]
    if limit is None:
        span = _rows(q, batch, tokens, total, causal=True, window=window)
    else:
        span = document_span(limit, total - tokens, window, document_multiple)
    parts = [(k.flatten(0, 1), v.flatten(0, 1), span)]
    if persistent is not None:
        parts.append((*persistent, _rows(q, 1, batch * tokens, persistent[0].shape[0])))
    y = merged_attention(library, q.flatten(0, 1), parts).unflatten(0, (batch, tokens))
    if limit is None:
        return y
    own = slice(total - tokens, total)
    return torch.where(alone(limit)[..., None, None], _attend_alone(q, k[:, own], v[:, own], persistent), y)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, *, memory: KeyValue | None, persistent: KeyValue | None, context: KeyValue | None,
    library: Library, lengths: None = None,
) -> Tensor:  # fmt: skip
    """q [B, Tq, H, D], the last rows of k, v [B, S, H, D]; memory: pair of [B, S, H, D] or None, persistent: of [P, H, D],
    context: of [B, N, H, D]. Returns [B, Tq, H, D]."""
    batch, rows = q.shape[:2]
    causal = _rows(q, batch, rows, k.shape[1], causal=True)
    parts = [(x.flatten(0, 1), y.flatten(0, 1), causal) for x, y in ((k, v), *([] if memory is None else [memory]))]
    if context is not None:
        x, y = context
        parts.append((x.flatten(0, 1), y.flatten(0, 1), _rows(q, batch, rows, x.shape[1])))
    if persistent is not None:
        parts.append((*persistent, _rows(q, 1, batch * rows, persistent[0].shape[0])))
    return merged_attention(library, q.flatten(0, 1), parts).unflatten(0, (batch, rows))


def refuses_window(*, library: Library, q: Tensor, limit: Tensor | None, document_multiple: int, **_) -> str | None:
    reason = library.refuses(q)
    if reason is not None or limit is None:
        return reason
    batch, tokens, heads, _ = q.shape
    sequences = most_sequences(batch, tokens, document_multiple)
    blocks = sequences * -(-tokens // _ROWS) * heads
    if blocks <= MOST_BLOCKS and sequences <= max(batch * tokens // TOKENS_PER_SEQUENCE, 2 * _ROWS):
        return None
    return (
        f"positions: documents that start {document_multiple} tokens apart may make {sequences} sequences of "
        f"{batch} x {tokens} tokens, and it computes a grid for each"
    )


def refuses_segment(*, library: Library, q: Tensor, lengths: Tensor | None = None, **_) -> str | None:
    return library.refuses(q) if lengths is None else "lengths: it has one number of keys for all samples"


def _rows(q: Tensor, count: int, queries: int, keys: int, **sees) -> Span:
    """`count` sequences of one length."""
    number = torch.arange(count + 1, device=q.device, dtype=torch.int32)
    return Span(number * queries, number * keys, queries, keys, **sees)


def _attend_alone(q: Tensor, k: Tensor, v: Tensor, persistent: KeyValue | None) -> Tensor:
    """Each token sees itself and the persistent keys. All [B, T, H, D]; sums as in a kernel, in float32."""
    if persistent is None:
        return v
    wide = torch.promote_types(q.dtype, torch.float32)
    pk, pv = persistent
    own = (q.to(wide) * k).sum(-1, keepdim=True)
    scores = torch.cat((own, torch.einsum("bthd,phd->bthp", q, pk).to(wide)), -1) * q.shape[-1] ** -0.5
    weights = scores.softmax(-1)
    return (weights[..., :1] * v + torch.einsum("bthp,phd->bthd", weights[..., 1:], pv.to(wide))).to(q.dtype)
