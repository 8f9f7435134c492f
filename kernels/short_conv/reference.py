"""The oracle: every token's window gathered, any dtype."""

import torch
from torch import Tensor


def convolve(extended: Tensor, weight: Tensor, *, limit: Tensor | None, initial: Tensor | None) -> Tensor:
    """extended [B, K - 1 + T, C], whose first K - 1 are the tail; weight [C, K]; limit [B, T] or None: how far back each token
    may look; initial [1 or B, K - 1, C] or None: what stands before a document, zeros. Returns [B, T, C] in extended's dtype."""
    dtype = torch.promote_types(extended.dtype, torch.float32)
    before = weight.shape[1] - 1
    windows = extended.to(dtype).unfold(1, before + 1, 1)  # [B, T, C, K]
    if limit is not None:
        back = torch.arange(before, -1, -1, device=extended.device)  # distance of each tap
        outside = back > limit[..., None]  # [B, T, K]
        if initial is None:
            start = torch.zeros_like(windows)
        else:  # tap i of position p reads row p + i of what stands before the document
            row = (limit[..., None] + before - back).clamp(max=max(before - 1, 0))
            rows = initial.to(dtype).expand(len(extended), -1, -1).unsqueeze(1).expand(-1, row.shape[1], -1, -1)
            index = row.unsqueeze(-1).expand(-1, -1, -1, rows.shape[-1])
            start = rows.gather(2, index).mT if before else torch.zeros_like(windows)
        windows = torch.where(outside.unsqueeze(2), start, windows)
    return (windows * weight.to(dtype)).sum(-1).to(extended.dtype)
