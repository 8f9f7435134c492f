"""The walk over a group's tiles: the inner gradient of each, and what it writes.

A program holds `BH` rows of the last matrix of one head and, where there is a first layer, the same columns of its matrix, in float32
and both as [D, BH]: every product takes them as they are, or transposed on the right (a product's result transposed on the left is
what some compilers get wrong). z_L = sum_j a_j A_j over the NS = F / BH programs of a head is all that these exchange: between
launches, one per tile. With one program a head, or with the deltas known, one launch walks through all tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pretrain.kernels.memory_scan.triton.call import Call, Given, Group, Matrices, Tables, Tokens
from titans_pretrain.kernels.memory_scan.triton.matrices import (
    first_matrix,
    last_matrix_transposed,
    load_anchor,
    load_state,
    moved,
    store_state,
)
from titans_pretrain.kernels.memory_scan.triton.tile import (
    damping_factor,
    dot,
    gelu_and_slope,
    layer_norm,
    layer_norm_vjp,
    load_tokens,
    opens_chunk,
    rows_that_exist,
    store_tokens,
    tile_start,
)


@triton.jit
def open_tile(
    state, tile, n, at1, at2, reset, initial, kept, heads, offset, chunks, group_first, tiles, DEPTH: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """The state before a tile, after a reset if a document starts there; kept at the tile's slot."""
    whole = D * F
    v1, s1, v2, s2 = state
    if RESETS:
        row = reset + (n // heads).to(tl.int64) * chunks + tile // (CHUNK // BT)
        if opens_chunk(tile, offset, CHUNK, BT) & (tl.load(row) != 0):
            v1, s1, v2, s2 = load_state(moved(initial, n.to(tl.int64) * whole), at1, at2, DEPTH)
    slot = (n.to(tl.int64) * (tiles + 1) + 1 + tile - group_first) * whole
    store_state(moved(kept, slot), (v1, s1, v2, s2), at1, at2, DEPTH)
    return v1, s1, v2, s2


@triton.jit
def last_input(
    k, a1, n, j, start, tokens, heads, DEPTH: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr
):
    """Program j's part of what the last layer sees of the keys, a_j [BT, BH], and gelu' there (depth 1: unused)."""
    if DEPTH == 1:
        a = load_tokens(k, n, start, tokens, heads, j * BH, BT, BH, D)
        return a, a
    keys = load_tokens(k, n, start, tokens, heads, 0, BT, D, D).to(a1.dtype)
    return gelu_and_slope(dot(keys, a1))


@triton.jit
def inner_error(
    z,
    k,
    v,
    e_out,
    n_out,
    rstd_out,
    n,
    j,
    start,
    tokens,
    heads,
    eps,
    D: tl.constexpr,
    BT: tl.constexpr,
    NORM: tl.constexpr,
):
    """The gradient of |M(k) - v|^2 at z_L [BT, D], damped, in the dtype of the products; program 0 stores it, LN(z_L) and 1 / std."""
    values = load_tokens(v, n, start, tokens, heads, 0, BT, D, D)
    if NORM:
        normed, rstd = layer_norm(z, D)
        r = 2 * (load_tokens(k, n, start, tokens, heads, 0, BT, D, D) + normed - values)
        e = layer_norm_vjp(r, normed, rstd, D) * damping_factor(rstd, eps)[:, None]
        if j == 0:
            store_tokens(n_out, normed, n, start, tokens, 1, 0, BT, D, D)
            exists = rows_that_exist(start, tokens, BT)
            tl.store(rstd_out + n.to(tl.int64) * tokens + start + tl.arange(0, BT), rstd, mask=exists)
    else:
        e = 2 * (z - values)
    e = e.to(e_out.dtype.element_ty)
    if j == 0:
        store_tokens(e_out, e, n, start, tokens, 1, 0, BT, D, D)
    return e


@triton.jit
def write(
    state, a, slope, e, e_transposed, a2, k, last, carry, tile, n, start, tokens, heads, group_first, tiles, DEPTH: tl.constexpr,
    D: tl.constexpr, BT: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """The state after a tile: V+ = beta V + f S - (c o a)^T e, S+ = m S - (s o a)^T e, c and s the last rows of G and N."""
    v1, s1, v2, s2 = state
    dt = e.dtype
    place = (n.to(tl.int64) * GATES + GATES - 1) * tiles + tile - group_first
    rows = tl.arange(0, BT)
    c, s = tl.load(last + place * (2 * BT) + 2 * rows), tl.load(last + place * (2 * BT) + 2 * rows + 1)
    beta, f, m = tl.load(carry + place * 4), tl.load(carry + place * 4 + 1), tl.load(carry + place * 4 + 2)
    v2 = dot(e_transposed, (-c[:, None] * a).to(dt), beta * v2 + f * s2)
    s2 = dot(e_transposed, (-s[:, None] * a).to(dt), m * s2)
    if DEPTH == 2:
        if GATES == 2:
            place -= tiles
            c, s = tl.load(last + place * (2 * BT) + 2 * rows), tl.load(last + place * (2 * BT) + 2 * rows + 1)
            beta, f, m = tl.load(carry + place * 4), tl.load(carry + place * 4 + 1), tl.load(carry + place * 4 + 2)
        e1 = dot(e, a2) * slope
        keys = tl.trans(load_tokens(k, n, start, tokens, heads, 0, BT, D, D).to(dt))
        v1 = dot(keys, (-c[:, None] * e1).to(dt), beta * v1 + f * s1)
        s1 = dot(keys, (-s[:, None] * e1).to(dt), m * s1)
    return v1, s1, v2, s2


@triton.jit(do_not_specialize=["eps", "tokens", "heads", "offset", "chunks", "group_first", "tiles"])
def walk_kernel(
    k, v, last, carry, reset, run, initial, towards, kept, e_out, n_out, rstd_out, eps, tokens, heads, offset, chunks, group_first,
    tiles, DEPTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BH: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr,
    GATES: tl.constexpr, NORM: tl.constexpr, TO_INITIAL: tl.constexpr, RESETS: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """All tiles of a group. Program n * NS + j; unless the deltas are KNOWN, NS is 1."""
    NS: tl.constexpr = F // BH
    n, j = tl.program_id(0) // NS, tl.program_id(0) % NS
    at1, at2 = first_matrix(j, D, F, BH), last_matrix_transposed(j, D, BH)
    here = moved(run, n.to(tl.int64) * (D * F))
    state = load_state(here, at1, at2, DEPTH)
    # Not pipelined: an iteration reads what it, or an earlier one, has stored. Hoisting would only lengthen lives of registers.
    for tile in tl.range(group_first, group_first + tiles, num_stages=1, disable_licm=True):
        start = tile_start(tile, offset, BT)
        state = open_tile(
            state, tile, n, at1, at2, reset, initial, kept, heads, offset, chunks, group_first, tiles, DEPTH, D, F, CHUNK, BT,
            RESETS,
        )  # fmt: skip
        tl.debug_barrier()  # the anchor is read as it was kept
        if not KNOWN:
            a1, a2 = load_anchor(
                tile, n, at1, at2, kept, towards, offset, group_first, tiles, DEPTH, D, F, CHUNK, BT, TO_INITIAL
            )
            a, _ = last_input(k, a1, n, j, start, tokens, heads, DEPTH, D, BH, BT)
            z = dot(a.to(a2.dtype), tl.trans(a2))
            inner_error(z, k, v, e_out, n_out, rstd_out, n, j, start, tokens, heads, eps, D, BT, NORM)
            tl.debug_barrier()  # then all of it again, rather than kept in registers meanwhile
        a1, a2 = load_anchor(
            tile, n, at1, at2, kept, towards, offset, group_first, tiles, DEPTH, D, F, CHUNK, BT, TO_INITIAL
        )
        a, slope = last_input(k, a1, n, j, start, tokens, heads, DEPTH, D, BH, BT)
        e = load_tokens(e_out, n, start, tokens, 1, 0, BT, D, D).to(a2.dtype)
        # Transposed as it is read: as a product's result, transposed, it would stand on the left.
        exists = rows_that_exist(start, tokens, BT)
        pointers = (
            e_out + (n.to(tl.int64) * tokens + start) * D + tl.arange(0, D)[:, None] + tl.arange(0, BT)[None, :] * D
        )
        e_transposed = tl.load(pointers, mask=exists[None, :], other=0.0)
        state = write(
            state, a, slope, e, e_transposed, a2, k, last, carry, tile, n, start, tokens, heads, group_first, tiles, DEPTH, D, BT,
            GATES,
        )  # fmt: skip
    store_state(here, state, at1, at2, DEPTH)


@triton.jit(do_not_specialize=["eps", "tokens", "heads", "offset", "chunks", "group_first", "tiles", "tile"])
def exchange_kernel(
    k, v, last, carry, reset, run, initial, towards, kept, e_out, n_out, rstd_out, partial, eps, tokens, heads, offset, chunks,
    group_first, tiles, tile, DEPTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BH: tl.constexpr, CHUNK: tl.constexpr,
    BT: tl.constexpr, GATES: tl.constexpr, NORM: tl.constexpr, TO_INITIAL: tl.constexpr, RESETS: tl.constexpr,
    FINISH: tl.constexpr, OPEN: tl.constexpr,
):  # fmt: skip
    """Finishes a tile, whose parts of z_L are there, and opens the next. Program n * NS + j. partial [2, N, NS, BT, D]."""
    NS: tl.constexpr = F // BH
    n, j = tl.program_id(0) // NS, tl.program_id(0) % NS
    at1, at2 = first_matrix(j, D, F, BH), last_matrix_transposed(j, D, BH)
    here = moved(run, n.to(tl.int64) * (D * F))
    state = load_state(here, at1, at2, DEPTH)
    square = tl.arange(0, BT)[:, None] * D + tl.arange(0, D)[None, :]
    programs = tl.num_programs(0).to(tl.int64)
    if FINISH:
        start = tile_start(tile, offset, BT)
        parts = partial + ((tile % 2) * programs + n * NS) * (BT * D) + square
        z = tl.load(parts)
        for i in range(1, NS):
            z += tl.load(parts + i * (BT * D))
        e = inner_error(z, k, v, e_out, n_out, rstd_out, n, j, start, tokens, heads, eps, D, BT, NORM)
        tl.debug_barrier()
        a1, a2 = load_anchor(
            tile, n, at1, at2, kept, towards, offset, group_first, tiles, DEPTH, D, F, CHUNK, BT, TO_INITIAL
        )
        a, slope = last_input(k, a1, n, j, start, tokens, heads, DEPTH, D, BH, BT)
        state = write(
            state, a, slope, e, tl.trans(e), a2, k, last, carry, tile, n, start, tokens, heads, group_first, tiles, DEPTH, D, BT,
            GATES,
        )  # fmt: skip
    if OPEN:
        tile += 1
        state = open_tile(
            state, tile, n, at1, at2, reset, initial, kept, heads, offset, chunks, group_first, tiles, DEPTH, D, F, CHUNK, BT,
            RESETS,
        )  # fmt: skip
        tl.debug_barrier()
        a1, a2 = load_anchor(
            tile, n, at1, at2, kept, towards, offset, group_first, tiles, DEPTH, D, F, CHUNK, BT, TO_INITIAL
        )
        a, slope = last_input(k, a1, n, j, tile_start(tile, offset, BT), tokens, heads, DEPTH, D, BH, BT)
        parts = partial + ((tile % 2) * programs + n * NS + j) * (BT * D) + square
        tl.store(parts, dot(a.to(a2.dtype), tl.trans(a2)))
    store_state(here, state, at1, at2, DEPTH)


def walk(
    call: Call, group: Group, x: Tokens, tables: Tables, run: Matrices, initial: Matrices, given: Given, known: bool
) -> None:
    """Moves the state `run` (float32, [N, d_in, d_out]) over a group's tiles in place. Fills given.states but for slot 0, and, unless
    they are known, e, n and rstd."""
    kernel = call.row.state
    programs = call.n * (call.hidden // kernel.hidden)
    arguments = (
        x.k,
        x.v,
        tables.last,
        tables.carry,
        given.reset,
        run,
        initial,
        given.towards,
        given.states,
        given.e,
        given.n,
        given.rstd,
    )
    numbers = (call.eps, call.tokens, call.heads, call.offset, call.chunks, group.first, group.tiles)
    options = dict(
        DEPTH=call.depth, D=call.dim, F=call.hidden, BH=kernel.hidden, CHUNK=call.chunk, BT=call.tile, GATES=call.gates,
        NORM=call.residual_norm, TO_INITIAL=call.to_initial, RESETS=call.resets, num_warps=kernel.warps, num_stages=kernel.stages,
    )  # fmt: skip
    if known or programs == call.n:
        walk_kernel[(programs,)](*arguments, *numbers, **options, KNOWN=known)
        return
    partial: Tensor = torch.empty(2, programs, call.tile, call.dim, device=x.k.device)
    for tile in range(group.first - 1, group.stop):
        edges = dict(FINISH=tile >= group.first, OPEN=tile + 1 < group.stop)
        exchange_kernel[(programs,)](*arguments, partial, *numbers, tile, **options, **edges)
