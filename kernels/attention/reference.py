"""The oracle of sliding-window attention: one dense mask over all queries and keys, any dtype."""

import torch
from torch import Tensor


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, limit: Tensor | None, persistent: tuple[Tensor, Tensor] | None
) -> Tensor:
    """q [B, T, H, D]; k, v [B, S + T, H, D], whose first S are the tail; limit [B, T] or None: how far back, at most,
    each query sees; persistent: pair of [P, H, D] or None. Returns [B, T, H, D]. O(T * (S + T)) memory."""
    batch, tokens, _, size = q.shape
    total = k.shape[1]
    query = torch.arange(total - tokens, total, device=q.device)
    distance = query[:, None] - torch.arange(total, device=q.device)
    visible = ((distance >= 0) & (distance < window)).expand(batch, -1, -1)
    if limit is not None:
        visible = visible & (distance <= limit[..., None])
    if persistent is not None:
        k, v = (torch.cat((p.expand(batch, -1, -1, -1), x), 1) for p, x in zip(persistent, (k, v), strict=True))
        visible = torch.cat((visible.new_ones(batch, tokens, persistent[0].shape[0]), visible), -1)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * size**-0.5
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)
