"""One token for decoding, and reading without writing: one launch each, not differentiable.

A token's products are sums in float32: what takes the time is the state on its way through memory.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pretrain.kernels.memory_scan.triton.call import Matrices
from titans_pretrain.kernels.memory_scan.triton.launch import row_of
from titans_pretrain.kernels.memory_scan.triton.matrices import first_matrix, last_matrix, moved
from titans_pretrain.kernels.memory_scan.triton.tile import (
    damping_factor,
    dot,
    gelu,
    gelu_and_slope,
    layer_norm,
    layer_norm_vjp,
    load_tokens,
    store_tokens,
)


@triton.jit
def times(x, w):
    """x [1, n] @ w [n, m] -> [1, m]."""
    return tl.sum(tl.trans(x) * w, 0)[None, :]


@triton.jit
def times_transposed(x, w):
    """x [1, m] @ w [n, m]^T -> [1, n]."""
    return tl.sum(x * w, 1)[None, :]


@triton.jit
def write_one(w, s, new_w, new_s, towards, at, a, e, forget, momentum, lr, place, TO_INITIAL: tl.constexpr):
    """The matrix at offsets `at` after a token that is a [1, n] (x) e [1, m]; place: of the token's gates."""
    alpha = tl.load(forget + place).to(tl.float32)
    surprise = tl.load(momentum + place).to(tl.float32) * tl.load(s + at)
    surprise -= tl.load(lr + place).to(tl.float32) * (tl.trans(a) * e)
    weights = (1 - alpha) * tl.load(w + at) + surprise
    if TO_INITIAL:
        weights += alpha * tl.load(towards + at)
    tl.store(new_w + at, weights)
    tl.store(new_s + at, surprise)
    return weights


@triton.jit(do_not_specialize=["eps", "heads"])
def step_kernel(
    q, k, v, forget, momentum, lr, state, anchors, towards, new, y_out, eps, heads, batch1, batch2, DEPTH: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, BH: tl.constexpr, GATES: tl.constexpr, NORM: tl.constexpr, TO_INITIAL: tl.constexpr,
):  # fmt: skip
    """Program n. anchors: W1 and the last W at the chunk's start; towards: W_init of each, batch1 and batch2 from row to row."""
    n = tl.program_id(0)
    here = n.to(tl.int64) * (D * F)
    goal1 = towards[0] + (n // heads).to(tl.int64) * batch1 + (n % heads) * (D * F)
    goal2 = towards[1] + (n // heads).to(tl.int64) * batch2 + (n % heads) * (D * F)
    before, after = moved(state, here), moved(new, here)
    column = tl.arange(0, D)[None, :]
    query, key = tl.load(q + n * D + column).to(tl.float32), tl.load(k + n * D + column).to(tl.float32)
    value = tl.load(v + n * D + column).to(tl.float32)

    z = tl.zeros([1, D], tl.float32)
    for j in range(0, F // BH):
        if DEPTH == 2:
            a = gelu(times(key, tl.load(anchors[0] + here + first_matrix(j, D, F, BH))))
        else:
            a = tl.load(k + n * D + j * BH + tl.arange(0, BH)[None, :]).to(tl.float32)
        z += times(a, tl.load(anchors[1] + here + last_matrix(j, D, BH)))
    if NORM:
        normed, rstd = layer_norm(z, D)
        e = layer_norm_vjp(2 * (key + normed - value), normed, rstd, D) * damping_factor(rstd, eps)[:, None]
    else:
        e = 2 * (z - value)

    y = tl.zeros([1, D], tl.float32)
    for j in range(0, F // BH):
        at1, at2 = first_matrix(j, D, F, BH), last_matrix(j, D, BH)
        if DEPTH == 2:
            a, slope = gelu_and_slope(times(key, tl.load(anchors[0] + here + at1)))
            e1 = times_transposed(e, tl.load(anchors[1] + here + at2)) * slope
            w1 = write_one(
                before[0],
                before[1],
                after[0],
                after[1],
                goal1,
                at1,
                key,
                e1,
                forget,
                momentum,
                lr,
                n * GATES,
                TO_INITIAL,
            )
            x = gelu(times(query, w1))
        else:
            a = tl.load(k + n * D + j * BH + tl.arange(0, BH)[None, :]).to(tl.float32)
            x = tl.load(q + n * D + j * BH + tl.arange(0, BH)[None, :]).to(tl.float32)
        w2 = write_one(
            before[2], before[3], after[2], after[3], goal2, at2, a, e, forget, momentum, lr, n * GATES + GATES - 1,
            TO_INITIAL,
        )  # fmt: skip
        y += times(x, w2)
    if NORM:
        y = query + layer_norm(y, D)[0]
    tl.store(y_out + n * D + column, y.to(y_out.dtype.element_ty))


@triton.jit(do_not_specialize=["tokens", "heads", "tiles"])
def network_kernel(
    q, weights, y_out, tokens, heads, tiles, batch1, batch2, DEPTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BH: tl.constexpr, BT: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """M(q) at the given weights. Program n * tiles + tile; batch1, batch2: from row to row of the weights' batch."""
    n, start = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BT
    first = weights[0] + (n // heads).to(tl.int64) * batch1 + (n % heads) * (D * F)
    last = weights[1] + (n // heads).to(tl.int64) * batch2 + (n % heads) * (D * F)
    queries = load_tokens(q, n, start, tokens, heads, 0, BT, D, D)
    y = tl.zeros([BT, D], tl.float32)
    for j in range(0, F // BH):
        if DEPTH == 2:
            x = gelu(dot(queries, tl.load(first + first_matrix(j, D, F, BH))))
        else:
            x = load_tokens(q, n, start, tokens, heads, j * BH, BT, BH, D)
        y = dot(x, tl.load(last + last_matrix(j, D, BH)), y)
    if NORM:
        y = queries + layer_norm(y, D)[0]
    store_tokens(y_out, y, n, start, tokens, heads, 0, BT, D, D)


def step(
    tokens: Sequence[Tensor], weights: Sequence[Tensor], surprise: Sequence[Tensor], anchor: Sequence[Tensor],
    initial: Sequence[Tensor], residual_norm: bool, damping: float,
) -> list[Tensor]:  # fmt: skip
    """y, then V and S of each layer after the token. initial: W_init where forgetting goes there, else empty."""
    q, k, v, forget, momentum, lr = (x.contiguous() for x in tokens)
    state = [x.contiguous() for x in _slots(weights, surprise)]
    anchors = [x.contiguous() for x in anchor]
    towards = [_by_batch(x) for x in initial or anchors]
    new = [torch.empty_like(x) for x in state]
    y = torch.empty_like(q)
    batch, _, heads, dim = q.shape
    depth, hidden = len(weights), weights[-1].shape[-2]
    kernel = row_of(depth, dim, hidden).step
    with torch.cuda.device_of(q):
        step_kernel[(batch * heads,)](
            q, k, v, forget, momentum, lr, Matrices.of(state), (anchors[0], anchors[-1]), (towards[0], towards[-1]), Matrices.of(new),
            y, damping * hidden, heads, towards[0].stride(0), towards[-1].stride(0), DEPTH=depth, D=dim, F=hidden, BH=kernel.hidden,
            GATES=forget.shape[-1], NORM=residual_norm, TO_INITIAL=len(initial) > 0, num_warps=kernel.warps, num_stages=kernel.stages,
        )  # fmt: skip
    return [y, *new]


memory_step = torch.library.custom_op("titans_pretrain::memory_step", step, mutates_args=())


@memory_step.register_fake
def _(tokens, weights, surprise, anchor, initial, residual_norm, damping):
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (tokens[0], *_slots(weights, surprise))]


def read(q: Tensor, weights: Sequence[Tensor], residual_norm: bool) -> Tensor:
    """M(q) at the weights of each layer."""
    q = q.contiguous()
    given = [_by_batch(w) for w in weights]
    y = torch.empty_like(q)
    batch, tokens, heads, dim = q.shape
    depth, hidden = len(weights), weights[-1].shape[-2]
    kernel = row_of(depth, dim, hidden).step
    tile = 16 if tokens <= 16 else 64
    tiles = triton.cdiv(tokens, tile)
    with torch.cuda.device_of(q):
        network_kernel[(batch * heads * tiles,)](
            q, (given[0], given[-1]), y, tokens, heads, tiles, given[0].stride(0), given[-1].stride(0), DEPTH=depth, D=dim, F=hidden,
            BH=kernel.hidden, BT=tile, NORM=residual_norm, num_warps=kernel.warps, num_stages=kernel.stages,
        )  # fmt: skip
    return y


memory_read = torch.library.custom_op("titans_pretrain::memory_read", read, mutates_args=())


@memory_read.register_fake
def _(q, weights, residual_norm):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _slots(weights: Sequence[Tensor], surprise: Sequence[Tensor]) -> list[Tensor]:
    return [x for slots in zip(weights, surprise, strict=True) for x in slots]


def _by_batch(x: Tensor) -> Tensor:
    """x [B, H, d_in, d_out] with contiguous rows; rows that are one (an expanded batch) stay one."""
    return x if x[0].is_contiguous() else x.contiguous()
