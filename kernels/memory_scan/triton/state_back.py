"""The walk over a group's tiles in reverse: the adjoint of the writes, of the carry and of the inner gradient.

A program holds the gradients of `BH` rows of the last matrix of one head and, where there is a first layer, of the same columns of its
matrix, in float32 and both as [D, BH], as the forward walk does (state.py). With the state's gradient after a tile known, all is a
program's own up to the gradient of the last deltas, whose parts its head's programs add up; what is behind that sum, a program's own
again, gives the state's gradient before the tile. So step t of the walk finishes tile t and begins tile t - 1, and the sum lies
between steps: between launches where a head has several programs, else in memory, where one launch takes all steps.

What a step reads of the one before is written by the same program, or by another launch; a barrier ends every step. Loads must not be
moved across it: no software pipelining here (num_stages=1).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pretrain.kernels.memory_scan.triton.blocks import (
    load_block,
    load_block_t,
    load_kept,
    load_pair,
    load_tokens_t,
    store_block,
    store_pair,
)
from titans_pretrain.kernels.memory_scan.triton.call import Call, Carried, Given, Group, ReadGradients, Tables, Tokens
from titans_pretrain.kernels.memory_scan.triton.matrices import (
    first_matrix,
    last_matrix_transposed,
    load_anchor,
    moved,
)
from titans_pretrain.kernels.memory_scan.triton.tile import (
    damping_factor,
    dot,
    gelu,
    gelu_and_slope,
    gelu_derivatives,
    layer_norm_vjp,
    load_tokens,
    opens_chunk,
    rows_that_exist,
    store_tokens,
    tile_start,
)


@triton.jit(do_not_specialize=["eps", "tokens", "heads", "offset", "chunks", "group_first", "tiles", "begin", "steps"])
def state_back_kernel(
    q, k, v, tables, reset, kept, towards, keys_norm, reads, run, d_anchor, d_towards, d_initial, exchange, d_keys, d_v, d_last,
    d_carry, eps, tokens, heads, offset, chunks, group_first, tiles, begin, steps, DEPTH: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, BH: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr, GATES: tl.constexpr, NORM: tl.constexpr,
    TO_INITIAL: tl.constexpr, RESETS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Steps begin, begin - 1, ... of the tiles [group_first, group_first + tiles). Program n * NS + j.

    tables: read, last, carry    keys_norm: e, n, rstd    reads: x, d_p1, d_p2, d_a, d_e1, d_e2
    exchange: parts of d_e_L [2, N, NS, BT, D] float32; a program's own for the next step, [2, N, BT, F]: d_p float32, d_g
    ACCUMULATE: there are tiles that do not open a chunk, or the gradient of an anchor is given
    """
    NS: tl.constexpr = F // BH
    n, j = (tl.program_id(0) // NS).to(tl.int64), tl.program_id(0) % NS
    at1, at2 = first_matrix(j, D, F, BH), last_matrix_transposed(j, D, BH)
    whole = n * (D * F)
    run, d_initial = moved(run, whole), moved(d_initial, whole)
    d_anchor = d_anchor[0] + whole, d_anchor[1] + whole
    d_towards = d_towards[0] + whole, d_towards[1] + whole
    for step in tl.range(steps, num_stages=1, disable_licm=True):
        tile = begin - step
        if tile < group_first + tiles:
            finish_tile(
                tile, n, j, at1, at2, q, k, v, tables, reset, kept, towards, keys_norm, reads, run, d_anchor, d_towards, d_initial,
                exchange, d_keys, d_v, eps, tokens, heads, offset, chunks, group_first, tiles, DEPTH, D, F, BH, CHUNK, BT, GATES, NORM,
                TO_INITIAL, RESETS, ACCUMULATE,
            )  # fmt: skip
        tl.debug_barrier()
        if tile > group_first:
            begin_last_layer(
                tile - 1, n, j, at1, at2, k, tables, kept, towards, keys_norm, run, exchange, d_last, d_carry, tokens, heads, offset,
                group_first, tiles, DEPTH, D, F, BH, CHUNK, BT, GATES, TO_INITIAL,
            )  # fmt: skip
            if DEPTH == 2:
                tl.debug_barrier()
                begin_first_layer(
                    tile - 1, n, j, at1, at2, k, tables, kept, towards, keys_norm, reads, run, exchange, d_keys, d_last, d_carry,
                    tokens, heads, offset, group_first, tiles, D, F, BH, CHUNK, BT, GATES, TO_INITIAL,
                )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def begin_last_layer(
    tile, n, j, at1, at2, k, tables, kept, towards, keys_norm, run, exchange, d_last, d_carry, tokens, heads, offset, group_first, tiles,
    DEPTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BH: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr,
    GATES: tl.constexpr, TO_INITIAL: tl.constexpr,
):  # fmt: skip
    """From the gradient of the state after a tile: the last layer's write and carry. Leaves parts of d_e_L, and d_a."""
    NS: tl.constexpr = F // BH
    start, at, parity = tile_start(tile, offset, BT), tile - group_first, tile % 2
    programs = tl.num_programs(0).to(tl.int64)
    e = load_kept(keys_norm[0], n, start, tokens, BT, D)
    dt = e.dtype
    if DEPTH == 2:
        a1, _ = load_anchor(
            tile, n, at1, at2, kept, towards, offset, group_first, tiles, DEPTH, D, F, CHUNK, BT, TO_INITIAL
        )
        a = gelu(dot(load_tokens(k, n, start, tokens, heads, 0, BT, D, D).to(dt), a1))
    else:
        a = load_tokens(k, n, start, tokens, heads, j * BH, BT, BH, D)
    part = ((n * DEPTH + DEPTH - 1) * NS + j) * tiles + at
    state = moved(kept, (n * (tiles + 1) + 1 + at) * (D * F))
    d_v, d_s = tl.load(run[2] + at2), tl.load(run[3] + at2)
    _store_carry(d_carry, part, d_v, d_s, tl.load(state[2] + at2), tl.load(state[3] + at2))
    d_v, d_s = d_v.to(dt), d_s.to(dt)
    c, s = load_pair(tables[1], (n * GATES + GATES - 1) * tiles + at, BT)
    along_v, along_s = dot(e, d_v), dot(e, d_s)
    store_pair(d_last, part, -tl.sum(a * along_v, 1), -tl.sum(a * along_s, 1), BT)
    own = (parity * (programs // NS) + n) * BT
    store_block(exchange[1], -c[:, None] * along_v - s[:, None] * along_s, own, j * BH, F, BT, BH)
    d_e = dot((-c[:, None] * a).to(dt), tl.trans(d_v))
    d_e = dot((-s[:, None] * a).to(dt), tl.trans(d_s), d_e)
    store_block(exchange[0], d_e, (parity * programs + n * NS + j) * BT, 0, D, BT, D)


@triton.jit
def begin_first_layer(
    tile, n, j, at1, at2, k, tables, kept, towards, keys_norm, reads, run, exchange, d_keys, d_last, d_carry, tokens, heads, offset,
    group_first, tiles, D: tl.constexpr, F: tl.constexpr, BH: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr,
    GATES: tl.constexpr, TO_INITIAL: tl.constexpr,
):  # fmt: skip
    """The first layer's, after begin_last_layer, and back through the deltas: completes this program's part of d_e_L."""
    NS: tl.constexpr = F // BH
    start, at, parity = tile_start(tile, offset, BT), tile - group_first, tile % 2
    rows = (n * tiles + at) * BT
    programs = tl.num_programs(0).to(tl.int64)
    own = (parity * (programs // NS) + n) * BT
    e = load_kept(keys_norm[0], n, start, tokens, BT, D)
    dt = e.dtype
    part = (n * 2 * NS + j) * tiles + at
    state = moved(kept, (n * (tiles + 1) + 1 + at) * (D * F))
    d_v, d_s = tl.load(run[0] + at1), tl.load(run[1] + at1)
    _store_carry(d_carry, part, d_v, d_s, tl.load(state[0] + at1), tl.load(state[1] + at1))
    d_v, d_s = d_v.to(dt), d_s.to(dt)
    c, s = load_pair(tables[1], n * GATES * tiles + at, BT)
    keys = load_tokens(k, n, start, tokens, heads, 0, BT, D, D)
    d_e1 = load_block(reads[4], rows, j * BH, F, BT, BH).to(tl.float32)
    d_e1 = dot((-c[:, None] * keys).to(dt), d_v, d_e1)
    d_e1 = dot((-s[:, None] * keys).to(dt), d_s, d_e1)
    a1, a2 = load_anchor(tile, n, at1, at2, kept, towards, offset, group_first, tiles, 2, D, F, CHUNK, BT, TO_INITIAL)
    _, slope, curvature = gelu_derivatives(dot(keys.to(dt), a1))
    d_back = (d_e1 * slope).to(dt)
    store_block(exchange[2], d_back, own, j * BH, F, BT, BH)
    place = (parity * programs + n * NS + j) * BT
    d_e = dot(d_back, tl.trans(a2), load_block(exchange[0], place, 0, D, BT, D))
    store_block(exchange[0], d_e, place, 0, D, BT, D)
    back = dot(e, a2)
    d_a = load_block(exchange[1], own, j * BH, F, BT, BH) + load_block(reads[3], rows, j * BH, F, BT, BH).to(tl.float32)
    store_block(exchange[1], d_e1 * back * curvature + d_a * slope, own, j * BH, F, BT, BH)
    e1 = (back * slope).to(dt)
    along_v, along_s = dot(e1, tl.trans(d_v)), dot(e1, tl.trans(d_s))
    keys = load_tokens(k, n, start, tokens, heads, 0, BT, D, D)
    store_pair(d_last, part, -tl.sum(keys * along_v, 1), -tl.sum(keys * along_s, 1), BT)
    d_k = -c[:, None] * along_v - s[:, None] * along_s
    store_block(d_keys, d_k, ((n * NS + j) * tiles + at) * BT, 0, D, BT, D)


@triton.jit
def finish_tile(
    tile, n, j, at1, at2, q, k, v, tables, reset, kept, towards, keys_norm, reads, run, d_anchor, d_towards, d_initial, exchange,
    d_keys, d_v, eps, tokens, heads, offset, chunks, group_first, tiles, DEPTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BH: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr, GATES: tl.constexpr, NORM: tl.constexpr, TO_INITIAL: tl.constexpr,
    RESETS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """From d_e_L: the inner gradient's adjoint; the gradient of the state before the tile, that of the anchor joined at a chunk's
    first."""
    NS: tl.constexpr = F // BH
    start = tile_start(tile, offset, BT)
    at = tile - group_first
    rows = (n * tiles + at) * BT
    programs = tl.num_programs(0).to(tl.int64)
    parity = tile % 2
    own = (parity * (programs // NS) + n) * BT
    dt = keys_norm[0].dtype.element_ty
    d_e = load_block(reads[5], rows, 0, D, BT, D)
    for i in range(NS):
        d_e += load_block(exchange[0], (parity * programs + n * NS + i) * BT, 0, D, BT, D)
    if NORM:
        d_z, d_r = norm_adjoint(d_e, k, v, keys_norm, n, start, tokens, heads, eps, D, BT)
    else:
        d_z, d_r = 2 * d_e, d_e
    d_z = d_z.to(dt)
    if j == 0:
        store_tokens(d_v, -2 * d_r, n, start, tokens, heads, 0, BT, D, D)

    a1, a2 = load_anchor(
        tile,
        n,
        at1,
        at2,
        kept,
        towards,
        offset,
        group_first,
        tiles,
        DEPTH,
        D,
        F,
        CHUNK,
        BT,
        TO_INITIAL,
    )
    d_p = load_block(exchange[1], own, j * BH, F, BT, BH)
    last = (n * GATES + GATES - 1) * tiles + at
    opens = opens_chunk(tile, offset, CHUNK, BT)
    starts = False
    if RESETS:
        starts = opens & (tl.load(reset + (n // heads) * chunks + tile // (CHUNK // BT)) != 0)
    if DEPTH == 2:
        keys = load_tokens(k, n, start, tokens, heads, 0, BT, D, D).to(dt)
        a, slope = gelu_and_slope(dot(keys, a1))
        a = a.to(dt)
        d_p = (d_p + slope * dot(d_z, a2)).to(dt)
        part = ((n * NS + j) * tiles + at) * BT
        store_block(d_keys, dot(d_p, tl.trans(a1), load_block(d_keys, part, 0, D, BT, D)), part, 0, D, BT, D)
        first = last - (GATES - 1) * tiles
        beta, f = load_pair(tables[0], first, BT)
        finish_layer(
            run[0] + at1, run[1] + at1, d_anchor[0] + at1, d_towards[0] + at1, d_initial[0] + at1, d_initial[1] + at1,
            dot(load_tokens_t(k, n, start, tokens, heads, BT, D).to(dt), d_p), tables[2] + first * 4, beta, f,
            load_tokens_t(q, n, start, tokens, heads, BT, D).to(dt), load_block(reads[1], rows, j * BH, F, BT, BH),
            opens, starts, TO_INITIAL, RESETS, ACCUMULATE,
        )  # fmt: skip
        x = load_block(reads[0], rows, j * BH, F, BT, BH)
        d_a2 = dot(
            load_tokens_t(keys_norm[0], n, start, tokens, 1, BT, D), load_block(exchange[2], own, j * BH, F, BT, BH)
        )
        d_a2 = dot(tl.trans(d_z), a, d_a2)
    else:
        store_block(d_keys, dot(d_z, a2, d_p), rows, j * BH, D, BT, BH)
        x = load_tokens(q, n, start, tokens, heads, j * BH, BT, BH, D).to(dt)
        d_a2 = dot(tl.trans(d_z), load_tokens(k, n, start, tokens, heads, j * BH, BT, BH, D).to(dt))
    beta, f = load_pair(tables[0], last, BT)
    finish_layer(
        run[2] + at2, run[3] + at2, d_anchor[1] + at2, d_towards[1] + at2, d_initial[2] + at2, d_initial[3] + at2,
        d_a2, tables[2] + last * 4, beta, f, load_block_t(reads[2], rows, 0, D, BT, D), x,
        opens, starts, TO_INITIAL, RESETS, ACCUMULATE,
    )  # fmt: skip


@triton.jit
def finish_layer(
    d_v_at, d_s_at, d_anchor_at, d_towards_at, d_initial_v_at, d_initial_s_at, d_anchor, carry, beta, f, left_t, right, opens, starts,
    TO_INITIAL: tl.constexpr, RESETS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """One layer's state from after a tile to before it, in memory. The reads' part is left_t (beta o right), and likewise f, in the
    orientation of a program's matrices."""
    dt = right.dtype
    beta_last, f_last, m_last = tl.load(carry), tl.load(carry + 1), tl.load(carry + 2)
    d_v, d_s = tl.load(d_v_at), tl.load(d_s_at)
    d_s = m_last * d_s + f_last * d_v
    d_v = dot(left_t, (beta[:, None] * right.to(tl.float32)).to(dt), beta_last * d_v)
    d_s = dot(left_t, (f[:, None] * right.to(tl.float32)).to(dt), d_s)
    if ACCUMULATE:
        d_anchor += tl.load(d_anchor_at)
        tl.store(d_anchor_at, tl.where(opens, 0.0, d_anchor))
        d_anchor = tl.where(opens, d_anchor, 0.0)
    d_v += d_anchor
    if TO_INITIAL:
        tl.store(d_towards_at, dot(left_t, right, tl.load(d_towards_at) + d_anchor))
    if RESETS:
        if starts:
            tl.store(d_initial_v_at, tl.load(d_initial_v_at) + d_v)
            tl.store(d_initial_s_at, tl.load(d_initial_s_at) + d_s)
        d_v, d_s = tl.where(starts, 0.0, d_v), tl.where(starts, 0.0, d_s)
    tl.store(d_v_at, d_v)
    tl.store(d_s_at, d_s)


@triton.jit
def norm_adjoint(d_e, k, v, keys_norm, n, start, tokens, heads, eps, D: tl.constexpr, BT: tl.constexpr):
    """Gradients of z_L and of r = 2 (M(k) - v), from that of the damped e_L (README.md, "Backward")."""
    e = load_kept(keys_norm[0], n, start, tokens, BT, D).to(tl.float32)
    normed = load_kept(keys_norm[1], n, start, tokens, BT, D).to(tl.float32)
    exists = rows_that_exist(start, tokens, BT)
    rstd = tl.load(keys_norm[2] + n * tokens + start + tl.arange(0, BT), mask=exists, other=0.0)
    keys = load_tokens(k, n, start, tokens, heads, 0, BT, D, D)
    r = 2 * (keys + normed - load_tokens(v, n, start, tokens, heads, 0, BT, D, D))
    damp = damping_factor(rstd, eps)
    d_std = tl.sum(d_e * e, 1) * rstd * (2 * eps * damp * rstd * rstd - 1)
    d_e = damp[:, None] * d_e
    d_r = layer_norm_vjp(d_e, normed, rstd, D)
    along_r, along_d = tl.sum(r * normed, 1), tl.sum(d_e * normed, 1)
    d_n = 2 * d_r - (rstd / D)[:, None] * (along_r[:, None] * d_e + along_d[:, None] * r)
    return layer_norm_vjp(d_n, normed, rstd, D) + (d_std / D)[:, None] * normed, d_r


@triton.jit
def _store_carry(d_carry, part, d_v, d_s, v, s):
    v, s = v.to(tl.float32), s.to(tl.float32)
    tl.store(d_carry + part * 4, tl.sum(d_v * v))
    tl.store(d_carry + part * 4 + 1, tl.sum(d_v * s))
    tl.store(d_carry + part * 4 + 2, tl.sum(d_s * s))
    tl.store(d_carry + part * 4 + 3, 0.0)


def state_back(
    call: Call, group: Group, tokens: Tokens, tables: Tables, given: Given, read: ReadGradients, carried: Carried, d_k: Tensor,
    d_v: Tensor, d_tables: Tables,
) -> None:  # fmt: skip
    """Takes `carried` from the group's end to its start, in place. Adds to the group's tokens of d_k, which is then whole, fills those
    of d_v, float32 [B, T, H, D] both, and d_tables.last and .carry."""
    kernel = call.row.state_back
    n, slices, rows = call.n, call.hidden // kernel.hidden, group.tiles * call.tile
    parts = slices if call.depth == 2 else 1

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=d_k.device)

    exchange = (
        new(2, n, slices, call.tile, call.dim), new(2, n, call.tile, call.hidden), new(2, n, call.tile, call.hidden, dtype=call.dtype)
    )  # fmt: skip
    d_keys = new(n, parts, rows, call.dim)
    d_last, d_carry = (new(n, call.depth, slices, *x.shape[2:]) for x in (d_tables.last, d_tables.carry))
    steps = group.tiles + 1
    for begin in [group.stop] if slices == 1 else range(group.stop, group.first - 1, -1):
        state_back_kernel[(n * slices,)](
            tokens.q, tokens.k, tokens.v, (tables.read, tables.last, tables.carry), given.reset, given.states, given.towards,
            (given.e, given.n, given.rstd), read, carried.state, carried.anchor, carried.towards, carried.initial, exchange, d_keys,
            d_v, d_last, d_carry, call.eps, call.tokens, call.heads, call.offset, call.chunks, group.first, group.tiles, begin,
            steps if slices == 1 else 1, DEPTH=call.depth, D=call.dim, F=call.hidden, BH=kernel.hidden, CHUNK=call.chunk, BT=call.tile,
            GATES=call.gates, NORM=call.residual_norm, TO_INITIAL=call.to_initial, RESETS=call.resets,
            ACCUMULATE=call.chunk > call.tile or call.offset > 0 or call.ends_half, num_warps=kernel.warps, num_stages=1,
        )  # fmt: skip
    layers = (2,) if call.gates == call.depth else (1, 2)
    d_tables.last.copy_(d_last.sum(layers).view_as(d_tables.last))
    d_tables.carry.copy_(d_carry.sum(layers).view_as(d_tables.carry))
    start = group.first * call.tile - call.offset
    here = slice(max(start, 0), min(start + rows, call.tokens))
    added = d_keys.sum(1)[:, here.start - start : here.stop - start]
    d_k[:, here] += added.unflatten(0, (call.batch, call.heads)).transpose(1, 2)
    if call.residual_norm:  # M(k) = k + LN(z)
        d_k[:, here] -= d_v[:, here]
