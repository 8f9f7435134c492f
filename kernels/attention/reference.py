"""The oracles: one dense mask over all queries and keys, softmax written out, any dtype."""

import torch
from torch import Tensor


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, limit: Tensor | None, persistent: tuple[Tensor, Tensor] | None,
    document_multiple: int,
) -> Tensor:  # fmt: skip
    """q [B, T, H, D]; k, v [B, S + T, H, D], whose first S are the tail; limit [B, T] or None: how far back, at most,
    each query sees; persistent: pair of [P, H, D] or None. Returns [B, T, H, D]. O(T * (S + T)) memory."""
    batch, tokens = q.shape[:2]
    total = k.shape[1]
    query = torch.arange(total - tokens, total, device=q.device)
    distance = query[:, None] - torch.arange(total, device=q.device)
    visible = ((distance >= 0) & (distance < window)).expand(batch, -1, -1)
    if limit is not None:
        visible = visible & (distance <= limit[..., None])
    if persistent is not None:
        k, v = (torch.cat((p.expand(batch, -1, -1, -1), x), 1) for p, x in zip(persistent, (k, v), strict=True))
        visible = torch.cat((visible.new_ones(batch, tokens, persistent[0].shape[0]), visible), -1)
    return _attend(q, k, v, visible)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, *, memory: tuple[Tensor, Tensor] | None, persistent: tuple[Tensor, Tensor] | None,
    context: tuple[Tensor, Tensor] | None, lengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [B, Tq, H, D], the last rows of k, v [B, S, H, D]; memory: pair of [B, S, H, D] or None, persistent: of [P, H, D],
    context: of [B, N, H, D]; lengths: [B]. Returns [B, Tq, H, D]."""
    if lengths is not None:  # sample by sample, of its own tokens alone
        own = [slice(i, i + 1) for i in range(len(q))]
        cut = [slice(k.shape[1] - n, None) for n in lengths.tolist()]

        def one(pair, i):
            return None if pair is None else tuple(x[own[i], cut[i]] for x in pair)

        return torch.cat([
            segment_attention(
                q[own[i]], *one((k, v), i), memory=one(memory, i), persistent=persistent,
                context=None if context is None else tuple(x[own[i]] for x in context), lengths=None,
            )
            for i in range(len(q))
        ])  # fmt: skip
    batch, rows = q.shape[:2]
    length = k.shape[1]
    row = torch.arange(length - rows, length, device=q.device)
    causal = torch.arange(length, device=q.device) <= row[:, None]
    parts = [] if persistent is None else [tuple(x.expand(batch, -1, -1, -1) for x in persistent)]
    parts += [] if context is None else [context]
    visible = [causal.new_ones(rows, part[0].shape[1]) for part in parts]
    parts += [] if memory is None else [memory]
    visible += [] if memory is None else [causal]
    keys, values = (torch.cat(xs, 1) for xs in zip(*parts, (k, v), strict=True))
    return _attend(q, keys, values, torch.cat((*visible, causal), -1).expand(batch, -1, -1))


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [B, T, H, D], k, v [B, S, H, D], visible [B, T, S] bool -> [B, T, H, D]."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)
