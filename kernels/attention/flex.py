"""Attention over torch's FlexAttention (Dong et al. 2024, arXiv 2412.05496): documents by a mask that the kernel computes.

Its lse has a gradient, so the persistent keys are merged through autograd. The blocks that hold visible keys are listed here, for
each block of queries and, for the backward pass, for each block of keys: torch's own list is a dense matrix over all of both.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from titans_pretrain.kernels.attention.sdpa import segment_keys

KeyValue = tuple[Tensor, Tensor]

BLOCK = 128
MOST_COMPILED = 64  # kernels: for each kind of mask, dtype and pass one of fixed lengths and one of any


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, limit: Tensor | None, persistent: KeyValue | None,
    document_multiple: int,
) -> Tensor:  # fmt: skip
    """q [B, T, H, D]; k, v [B, S + T, H, D], whose first S are the tail; limit [B, T] or None: how far back, at most,
    each query sees; persistent: pair of [P, H, D] or None. Returns [B, T, H, D]. Memory linear in T on a GPU."""
    batch, tokens = q.shape[:2]
    mask = window_mask(batch, tokens, k.shape[1], window, limit, q.device)
    if persistent is None:
        return _attend(q, k, v, mask)[0]
    y, lse = _attend(q, k, v, mask)
    every, every_lse = _attend(q.flatten(0, 1)[None], *(x[None] for x in persistent), None)
    every, every_lse = every.view_as(y), every_lse[0].unflatten(-1, (batch, tokens)).movedim(1, 0)
    joint = torch.logaddexp(lse, every_lse)
    y, every = ((part - joint).exp().mT.unsqueeze(-1) * x for part, x in ((lse, y), (every_lse, every)))
    return (y + every).to(q.dtype)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, *, memory: KeyValue | None, persistent: KeyValue | None, context: KeyValue | None,
    lengths: None = None,
) -> Tensor:  # fmt: skip
    """q [B, Tq, H, D], the last rows of k, v [B, S, H, D]; memory: pair of [B, S, H, D] or None, persistent: of [P, H, D],
    context: of [B, N, H, D]. Returns [B, Tq, H, D]."""
    rows, length = q.shape[1], k.shape[1]
    keys, values, always = segment_keys(k, v, memory, persistent, context)
    before = length - rows

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j < always) | (
            (j - always) % length <= i + before
        )  # what was retrieved for a token stands at its place

    first = torch.zeros(1, -(-rows // BLOCK), dtype=torch.int32, device=q.device)
    mask = _block_mask(first, torch.full_like(first, (keys.shape[1] - 1) // BLOCK), rows, keys.shape[1], visible)
    return _attend(q, keys, values, mask)[0]


def refuses(*, q: Tensor, lengths: Tensor | None = None, **_) -> str | None:
    if lengths is not None:
        return "lengths: it has one number of keys for all samples"
    if q.device.type != "cuda":
        return f"q: it is on {q.device.type}, where it makes a matrix of all scores"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q: {str(q.dtype).removeprefix('torch.')}, and it has float16 and bfloat16 only"
    if q.shape[-1] < 16:
        return f"q: heads of {q.shape[-1]}, and it has 16 and more only"
    return None


def window_mask(
    batch: int, tokens: int, total: int, window: int, limit: Tensor | None, device: torch.device
) -> BlockMask:
    """Of `tokens` queries, the last of `total` keys. Blocks and the mask in them follow limit [B, T]; its values stay on the device."""
    tail = total - tokens
    row = torch.arange(tokens, device=device)
    reach = torch.full((1, tokens), window - 1, device=device) if limit is None else limit.clamp(max=window - 1)
    rows = -(-tokens // BLOCK)
    # the first and the last key of each block of queries
    oldest = pad(tail + row - reach, (0, rows * BLOCK - tokens), value=total).unflatten(-1, (rows, BLOCK)).amin(-1)
    newest = tail + torch.arange(1, rows + 1, device=device) * BLOCK - 1
    first, last = oldest.clamp(min=0) // BLOCK, newest.clamp(max=total - 1) // BLOCK

    if limit is None:

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            back = i + tail - j
            return (back >= 0) & (back < window)

    else:

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            back = i + tail - j
            return (back >= 0) & (back <= reach[b, i])

    widest = min(-(-(window - 1 + BLOCK - 1) // BLOCK) + 1, -(-total // BLOCK))
    return _block_mask(first, last.expand_as(first), tokens, total, visible, widest)


def _block_mask(first: Tensor, last: Tensor, tokens: int, total: int, visible, widest: int | None = None) -> BlockMask:
    """first, last [1 or B, blocks of queries]: the first and the last block of keys that each sees; `last` must not fall. widest:
    no block of queries sees more blocks of keys, no block of keys is seen by more blocks of queries; None: any number."""
    rows, columns = first.shape[-1], -(-total // BLOCK)
    column = torch.arange(columns, device=first.device, dtype=first.dtype).expand(first.shape[0], -1).contiguous()
    # seen by a block of queries from the first on whose last key is not before it, up to the last whose first is not behind it
    above = torch.searchsorted(last.contiguous(), column)
    later = first.flip(-1).cummin(-1).values.flip(-1)  # the first key that this block of queries or a later one sees
    below = torch.searchsorted(later.contiguous(), column, right=True)
    return BlockMask(
        (tokens, total), *_list(first, last - first + 1, columns, widest), None, None,
        *_list(above, (below - above).clamp(min=0), rows, widest), None, None, (BLOCK, BLOCK), visible,
    )  # fmt: skip


def _list(start: Tensor, count: Tensor, of: int, widest: int | None) -> tuple[Tensor, Tensor]:
    """Numbers of blocks and their indices, [., 1, blocks] and [., 1, blocks, width]; of: blocks that there are."""
    width = of if widest is None else min(widest, of)
    indices = (start.unsqueeze(-1) + torch.arange(width, device=start.device)).clamp(max=of - 1)
    return count.int()[:, None].contiguous(), indices.int()[:, None].contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None) -> tuple[Tensor, Tensor]:
    """[B, T, H, D] -> y alike and lse [B, H, T]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type != "cuda" or torch.compiler.is_compiling():
        y, aux = flex_attention(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True))
    else:
        with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED):
            y, aux = _compiled()(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True))
    return y.transpose(1, 2), aux.lse


@cache
def _compiled():
    """fullgraph: past the limit an error, where torch would go on uncompiled, with a matrix of all scores."""
    return torch.compile(flex_attention, fullgraph=True)
