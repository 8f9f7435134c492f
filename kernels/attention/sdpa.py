"""Attention over torch's scaled_dot_product_attention. A sliding window goes by blocks of queries: never a T x T mask."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention


def block_size(window: int) -> int:
    """Queries that share one call: few calls, and little beyond the window is computed and masked away."""
    return min(max(window // 4, 64), 256)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, limit: Tensor | None, persistent: tuple[Tensor, Tensor] | None,
    document_multiple: int,
) -> Tensor:  # fmt: skip
    """q [B, T, H, D]; k, v [B, S + T, H, D], whose first S are the tail; limit [B, T] or None: how far back, at most,
    each query sees; persistent: pair of [P, H, D] or None. Returns [B, T, H, D]. Memory linear in T and in window."""
    tokens, total = q.shape[1], k.shape[1]
    if tokens == total and window >= total and limit is None and persistent is None:
        return _heads_first(scaled_dot_product_attention, q, k, v, is_causal=True)
    pk, pv = (None, None) if persistent is None else persistent
    if tokens <= block_size(window):
        (block,) = _Blocks(q, k, window, limit, pk)
        return _attend(q, k[:, block.keys], v[:, block.keys], pk, pv, block.mask())
    return _by_blocks(q, k, v, pk, pv, limit, window)


@torch.compiler.disable  # a loop over the blocks of the sequence, which a compiler would unroll
def _by_blocks(*arguments) -> Tensor:
    return _BlockedAttention.apply(*arguments)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, *, memory: tuple[Tensor, Tensor] | None, persistent: tuple[Tensor, Tensor] | None,
    context: tuple[Tensor, Tensor] | None, lengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [B, Tq, H, D], the last rows of k, v [B, S, H, D]; memory: pair of [B, S, H, D] or None, persistent: of [P, H, D],
    context: of [B, N, H, D]; lengths: [B]. Returns [B, Tq, H, D]."""
    rows, length = q.shape[1], k.shape[1]
    keys, values, always = segment_keys(k, v, memory, persistent, context)
    causal = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(length - rows)
    if lengths is not None:
        causal = causal & (torch.arange(length, device=q.device) >= length - lengths[:, None, None, None])
    always_seen = causal.new_ones(*causal.shape[:-1], always)
    mask = torch.cat((always_seen, *[causal] * (1 if memory is None else 2)), -1)
    return _heads_first(scaled_dot_product_attention, q, keys, values, attn_mask=mask)


def segment_keys(
    k: Tensor, v: Tensor, memory: tuple[Tensor, Tensor] | None, persistent: tuple[Tensor, Tensor] | None,
    context: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Keys and values [persistent | context | memory | segment] in one, and how many every row sees: the first two."""
    parts = [] if persistent is None else [tuple(x.expand(len(k), -1, -1, -1) for x in persistent)]
    parts += [] if context is None else [context]
    always = sum(part[0].shape[1] for part in parts)
    parts += [] if memory is None else [memory]
    keys, values = (torch.cat(xs, 1) for xs in zip(*parts, (k, v), strict=True))
    return keys, values, always


class _Block:
    """Queries `rows` of one call and the keys `keys` that any of them sees."""

    def __init__(self, rows: slice, keys: slice, distance: Tensor, window: int, limit: Tensor | None, persistent: int):
        self.rows, self.keys = rows, keys
        self._distance, self._window, self._limit, self._persistent = distance, window, limit, persistent

    def mask(self) -> Tensor | None:
        """Visible keys, [1 or B, 1, rows, P + keys] bool; None: all."""
        distance = self._distance
        if distance.shape[0] == 1 and self._limit is None:
            return None  # a single query: `keys` is exactly what it sees
        visible = ((distance >= 0) & (distance < self._window))[None]
        if self._limit is not None:
            visible = visible & (distance <= self._limit[:, self.rows, None])
        if self._persistent:
            visible = torch.cat((visible.new_ones(*visible.shape[:2], self._persistent), visible), -1)
        return visible[:, None]


class _Blocks:
    """Iterates over the blocks of a call."""

    def __init__(self, q: Tensor, k: Tensor, window: int, limit: Tensor | None, pk: Tensor | None):
        self.tokens, self.tail = q.shape[1], k.shape[1] - q.shape[1]
        self.window, self.limit, self.persistent = window, limit, 0 if pk is None else pk.shape[0]
        self.size = min(block_size(window), self.tokens)
        rows = torch.arange(self.size, device=q.device, dtype=torch.int32)
        columns = torch.arange(window - 1 + self.size, device=q.device, dtype=torch.int32)
        # column c of a block whose first query is token s holds key s - (window - 1) + c
        self.distance = rows[:, None] - columns + (window - 1)

    def __iter__(self):
        for start in range(0, self.tokens, self.size):
            stop = min(start + self.size, self.tokens)
            first = self.tail + start - (self.window - 1)
            low = max(first, 0)
            distance = self.distance[: stop - start, low - first : self.tail + stop - first]
            keys = slice(low, self.tail + stop)
            yield _Block(slice(start, stop), keys, distance, self.window, self.limit, self.persistent)


class _BlockedAttention(torch.autograd.Function):
    """Saves the inputs only and attends again, block by block, in the backward pass. Plain slices under autograd would
    write a zero gradient as long as the sequence for every block."""

    @staticmethod
    def forward(ctx, q, k, v, pk, pv, limit, window):
        ctx.save_for_backward(q, k, v, pk, pv, limit)
        ctx.window = window
        y = torch.empty_like(q)
        for block in _Blocks(q, k, window, limit, pk):
            y[:, block.rows] = _attend(q[:, block.rows], k[:, block.keys], v[:, block.keys], pk, pv, block.mask())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        q, k, v, pk, pv, limit = ctx.saved_tensors
        # several blocks add to one key's gradient: not in half precision
        totals = [None if x is None else torch.zeros_like(x, dtype=_sum_dtype(x)) for x in (q, k, v, pk, pv)]
        for block in _Blocks(q, k, ctx.window, limit, pk):
            everywhere = slice(None)
            where = (block.rows, block.keys, block.keys, everywhere, everywhere)
            parts = [
                None if x is None else (x if part is everywhere else x[:, part]).detach().requires_grad_()
                for x, part in zip((q, k, v, pk, pv), where, strict=True)
            ]
            with torch.enable_grad():
                y = _attend(*parts, block.mask())
            grads = iter(torch.autograd.grad(y, [x for x in parts if x is not None], grad_y[:, block.rows]))
            for total, part in zip(totals, where, strict=True):
                if total is not None:
                    (total if part is everywhere else total[:, part]).add_(next(grads))
        grads = (None if t is None else t.to(x.dtype) for t, x in zip(totals, (q, k, v, pk, pv), strict=True))
        return *grads, None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, pk: Tensor | None, pv: Tensor | None, mask: Tensor | None) -> Tensor:
    if pk is not None:
        k = torch.cat((pk.expand(k.shape[0], -1, -1, -1), k), 1)
        v = torch.cat((pv.expand(v.shape[0], -1, -1, -1), v), 1)
    return _heads_first(scaled_dot_product_attention, q, k, v, attn_mask=mask)


def _heads_first(attend, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options).transpose(1, 2)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
