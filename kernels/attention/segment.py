"""Attention of one memory-as-context segment."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    *,
    persistent: tuple[Tensor, Tensor] | None = None,
    context: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention over [persistent | context | retrieved memory | segment] (Titans, arXiv 2501.00663, equation 22), causal:
    row t of the segment sees k_j and memory_k_j for j <= t only, where the paper's full block would leak the future.

    Args:
        q: [B, Tq, H, D]: the last Tq tokens of the segment.
        k, v: [B, S, H, D]: the segment so far, S >= Tq.
        memory_k, memory_v: [B, S, H, D]: what was retrieved for each of its tokens, or None.
        persistent: (k, v), each [P, H, D]: visible to every row.
        context: (k, v), each [B, N, H, D]: visible to every row of its sample.

    Returns:
        y [B, Tq, H, D].

    Raises:
        ValueError: a shape or dtype that does not fit; one line that names the argument.
    """
    _check(q, k, v, memory_k, memory_v, persistent, context)
    batch, rows = q.shape[:2]
    length = k.shape[1]
    keys, values = [], []
    if persistent is not None:
        keys.append(persistent[0].to(k.dtype).expand(batch, -1, -1, -1))
        values.append(persistent[1].to(k.dtype).expand(batch, -1, -1, -1))
    if context is not None:
        keys.append(context[0].to(k.dtype))
        values.append(context[1].to(k.dtype))
    always = sum(x.shape[1] for x in keys)
    if memory_k is not None:
        keys.append(memory_k)
        values.append(memory_v)
    keys, values = torch.cat((*keys, k), 1), torch.cat((*values, v), 1)
    causal = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(length - rows)
    mask = torch.cat((causal.new_ones(rows, always), *[causal] * (1 if memory_k is None else 2)), 1)
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    return scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2)


def _check(q, k, v, memory_k, memory_v, persistent, context) -> None:
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
    if k.shape[1] < rows:
        raise ValueError(f"k holds {k.shape[1]} tokens of the segment; q, its last tokens, cannot hold {rows}")
    for name, pair, shape in (("persistent", persistent, (heads, size)), ("context", context, (batch, heads, size))):
        for x in pair or ():
            if x.dim() != len(shape) + 1 or (*x.shape[:-3], *x.shape[-2:]) != shape or x.shape != pair[0].shape:
                expected = "[P, H, D]" if name == "persistent" else "[B, N, H, D]"
                raise ValueError(f"{name} is {tuple(x.shape)}; both must be {expected} with H, D (and B) as in q")
