"""The adjoint of the read: a program is a tile of a head, which needs no other (README.md one folder up, "Backward").

Products of tokens with tokens that stand on the left of a product in both orientations are computed twice, as x y^T and as y x^T:
a result transposed in registers must not stand there (triton before 3.7.1 miscompiles it on Hopper). Hence the names in _t.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pretrain.kernels.memory_scan.triton.blocks import (
    anchor_slot,
    load_block,
    load_block_t,
    load_kept,
    store_block,
    store_block_t,
)
from titans_pretrain.kernels.memory_scan.triton.call import Call, Given, Group, ReadGradients, Tables, Tokens
from titans_pretrain.kernels.memory_scan.triton.tile import (
    dot,
    gelu_and_slope,
    layer_norm,
    layer_norm_vjp,
    load_tokens,
    rows_that_exist,
    store_tokens,
    tile_start,
    token_index,
)


@triton.jit(do_not_specialize=["tokens", "heads", "offset", "first", "tiles"])
def read_back_kernel(
    d_y, q, k, e, V1, S1, V2, S2, T1, T2, G, read, d_q, d_k, X, d_p1, d_p2, d_a, d_e1, d_e2, d_G, d_read,
    tokens, heads, offset, first, tiles,
    DEPTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, CHUNK: tl.constexpr,
    GATES: tl.constexpr, NORM: tl.constexpr, TO_INITIAL: tl.constexpr,
):  # fmt: skip
    """Program n * tiles + tile of the group."""
    program = tl.program_id(0)
    tile, n = program % tiles, (program // tiles).to(tl.int64)
    start = tile_start(first + tile, offset, BT)
    dt = V2.dtype.element_ty
    size: tl.constexpr = D * F

    here = (n * (tiles + 1) + 1 + tile) * size
    anchor = (n * (tiles + 1) + anchor_slot(first + tile, first, offset, CHUNK, BT)) * size
    towards = n * size
    at = (n * GATES) * tiles + tile
    at_last = at + (GATES - 1) * tiles
    rows = (n * tiles + tile) * BT

    q_rows = load_tokens(q, n, start, tokens, heads, 0, BT, D, D).to(dt)
    k_rows = load_tokens(k, n, start, tokens, heads, 0, BT, D, D).to(dt)
    e_rows = load_kept(e, n, start, tokens, BT, D)
    d_y_rows = load_tokens(d_y, n, start, tokens, heads, 0, BT, D, D)
    G2_t = load_block_t(G + at_last * BT * BT, 0, 0, BT, BT, BT)
    t = tl.arange(0, BT)
    beta = tl.load(read + at_last * BT * 2 + t * 2)
    f = tl.load(read + at_last * BT * 2 + t * 2 + 1)
    if DEPTH == 2:
        masked = (load_block(G + at * BT * BT, 0, 0, BT, BT, BT) * dot(q_rows, tl.trans(k_rows))).to(dt)
        masked_t = (load_block_t(G + at * BT * BT, 0, 0, BT, BT, BT) * dot(k_rows, tl.trans(q_rows))).to(dt)
        beta1 = tl.load(read + at * BT * 2 + t * 2)
        f1 = tl.load(read + at * BT * 2 + t * 2 + 1)

    if NORM:  # z of the read once more, for the norm's adjoint
        z = tl.zeros([BT, D], tl.float32)
        overlap = tl.zeros([BT, BT], tl.float32)
        for column in range(0, F, BH):
            if DEPTH == 2:
                a, e1, x, slope = _hidden(
                    q_rows,
                    k_rows,
                    e_rows,
                    masked,
                    beta1,
                    f1,
                    V1,
                    S1,
                    V2,
                    T1,
                    T2,
                    here,
                    anchor,
                    towards,
                    column,
                    D,
                    F,
                    BH,
                    TO_INITIAL,
                )
            else:
                a, x = k_rows, q_rows.to(tl.float32)
            z = dot((beta[:, None] * x).to(dt), load_block(V2 + here, column, 0, D, BH, D), z)
            z = dot((f[:, None] * x).to(dt), load_block(S2 + here, column, 0, D, BH, D), z)
            if TO_INITIAL:
                z = dot(x.to(dt), load_block(T2 + towards, column, 0, D, BH, D), z)
            overlap = dot(x.to(dt), tl.trans(a), overlap)
        z -= dot((load_block(G + at_last * BT * BT, 0, 0, BT, BT, BT) * overlap).to(dt), e_rows)
        normalised, rstd = layer_norm(z, D)
        d_p_rows = layer_norm_vjp(d_y_rows, normalised, rstd, D).to(dt)
    else:
        d_p_rows = d_y_rows.to(dt)
    store_block(d_p2, d_p_rows, rows, 0, D, BT, D)

    along_t = dot(e_rows, tl.trans(d_p_rows))
    d_overlap_t = (G2_t * along_t).to(dt)
    G2 = load_block(G + at_last * BT * BT, 0, 0, BT, BT, BT)
    d_overlap = (G2 * dot(d_p_rows, tl.trans(e_rows))).to(dt)
    overlap_t = tl.zeros([BT, BT], tl.float32)
    d_beta, d_f = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    if DEPTH == 2:
        along1_t = tl.zeros([BT, BT], tl.float32)
        by_V_t, by_S_t, by_T_t = (
            tl.zeros([D, BT], tl.float32),
            tl.zeros([D, BT], tl.float32),
            tl.zeros([D, BT], tl.float32),
        )
    for column in range(0, F, BH):
        if DEPTH == 2:
            a, e1, x, slope = _hidden(
                q_rows,
                k_rows,
                e_rows,
                masked,
                beta1,
                f1,
                V1,
                S1,
                V2,
                T1,
                T2,
                here,
                anchor,
                towards,
                column,
                D,
                F,
                BH,
                TO_INITIAL,
            )
        else:
            a, x = k_rows, q_rows.to(tl.float32)
        through_V = dot(d_p_rows, load_block_t(V2 + here, column, 0, D, BH, D))
        through_S = dot(d_p_rows, load_block_t(S2 + here, column, 0, D, BH, D))
        d_beta += tl.sum(x * through_V, 1)
        d_f += tl.sum(x * through_S, 1)
        d_x = beta[:, None] * through_V + f[:, None] * through_S - dot(d_overlap, a)
        if TO_INITIAL:
            d_x = dot(d_p_rows, load_block_t(T2 + towards, column, 0, D, BH, D), d_x)
        x_rows = x.to(dt)
        d_a_rows = -dot(d_overlap_t, x_rows)
        overlap_t = dot(a, tl.trans(x_rows), overlap_t)
        if DEPTH == 2:
            d_z = (d_x * slope).to(dt)
            store_block(X, x_rows, rows, column, F, BT, BH)
            store_block(d_p1, d_z, rows, column, F, BT, BH)
            store_block(d_a, d_a_rows, rows, column, F, BT, BH)
            store_block(d_e1, -dot(masked_t, d_z), rows, column, F, BT, BH)
            along1_t = dot(e1, tl.trans(d_z), along1_t)
            by_V_t = dot(load_block(V1 + here, 0, column, F, D, BH), tl.trans(d_z), by_V_t)
            by_S_t = dot(load_block(S1 + here, 0, column, F, D, BH), tl.trans(d_z), by_S_t)
            if TO_INITIAL:
                by_T_t = dot(load_block(T1 + towards, 0, column, F, D, BH), tl.trans(d_z), by_T_t)
        else:
            if NORM:
                d_x += d_y_rows
            store_tokens(d_q, d_x, n, start, tokens, heads, 0, BT, D, D)
            store_tokens(d_k, d_a_rows, n, start, tokens, heads, 0, BT, D, D)

    store_block(d_e2, -dot((G2_t * overlap_t).to(dt), d_p_rows), rows, 0, D, BT, D)
    d_G2_t = -along_t * overlap_t
    if DEPTH == 2:
        d_G1_t = -along1_t * dot(k_rows, tl.trans(q_rows))
        d_overlap1_t = (load_block_t(G + at * BT * BT, 0, 0, BT, BT, BT) * along1_t).to(dt)
        store_tokens(d_k, -dot(d_overlap1_t, q_rows), n, start, tokens, heads, 0, BT, D, D)
        exists = rows_that_exist(start, tokens, BT)[None, :]
        transposed = token_index(n, start, tokens, heads) * D + t[None, :] * (heads * D) + tl.arange(0, D)[:, None]
        q_t = tl.load(q + transposed, mask=exists, other=0.0).to(tl.float32)
        d_beta1, d_f1 = tl.sum(q_t * by_V_t, 0), tl.sum(q_t * by_S_t, 0)
        d_q_t = beta1[None, :] * by_V_t + f1[None, :] * by_S_t - dot(tl.trans(k_rows), d_overlap1_t)
        if TO_INITIAL:
            d_q_t += by_T_t
        if NORM:
            d_q_t += tl.load(d_y + transposed, mask=exists, other=0.0).to(tl.float32)
        tl.store(d_q + transposed, d_q_t, mask=exists)
        if GATES == 2:
            store_block_t(d_G + at * BT * BT, d_G1_t, 0, 0, BT, BT, BT)
            tl.store(d_read + at * BT * 2 + t * 2, d_beta1)
            tl.store(d_read + at * BT * 2 + t * 2 + 1, d_f1)
        else:
            d_G2_t += d_G1_t
            d_beta += d_beta1
            d_f += d_f1
    store_block_t(d_G + at_last * BT * BT, d_G2_t, 0, 0, BT, BT, BT)
    tl.store(d_read + at_last * BT * 2 + t * 2, d_beta)
    tl.store(d_read + at_last * BT * 2 + t * 2 + 1, d_f)


@triton.jit
def _hidden(
    q, k, e, masked, beta, f, V1, S1, V2, T1, T2, here, anchor, towards, column,
    D: tl.constexpr, F: tl.constexpr, BH: tl.constexpr, TO_INITIAL: tl.constexpr,
):  # fmt: skip
    """BH columns of a_1 and e_1, at the anchor, and of the read's x_1 = gelu(p_1), with gelu'(p_1)."""
    dt = q.dtype
    W1 = load_block(V1 + anchor, 0, column, F, D, BH)
    W2_t = load_block_t(V2 + anchor, column, 0, D, BH, D)
    V = load_block(V1 + here, 0, column, F, D, BH)
    S = load_block(S1 + here, 0, column, F, D, BH)
    p = beta[:, None] * dot(q, V) + f[:, None] * dot(q, S)
    if TO_INITIAL:
        T = load_block(T1 + towards, 0, column, F, D, BH)
        p = dot(q, T, p)
        W1 = (W1.to(tl.float32) + T.to(tl.float32)).to(dt)
        W2_t = (W2_t.to(tl.float32) + load_block_t(T2 + towards, column, 0, D, BH, D).to(tl.float32)).to(dt)
    a, slope = gelu_and_slope(dot(k, W1))
    e1 = (dot(e, W2_t) * slope).to(dt)
    x, slope = gelu_and_slope(p - dot(masked, e1))
    return a.to(dt), e1, x, slope


def read_back(
    call: Call, group: Group, tokens: Tokens, tables: Tables, given: Given, d_y: Tensor, d_q: Tensor, d_k: Tensor, d_tables: Tables
) -> ReadGradients:  # fmt: skip
    """Fills, from d_y [B, T, H, D], the group's tokens of d_q (whole) and of d_k (the reads' part), float32, and all of d_tables.G and
    d_tables.read."""
    kernel = call.row.read_back
    rows = group.tiles * call.tile

    def new(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(call.n, rows, width, dtype=dtype, device=d_y.device)

    inner = call.hidden if call.depth == 2 else 0
    x, d_p1, d_a, d_e1 = (new(inner, call.dtype) for _ in range(4))
    found = ReadGradients(x, d_p1, new(call.dim, call.dtype), d_a, d_e1, new(call.dim, torch.float32))
    read_back_kernel[(call.n * group.tiles,)](
        d_y, tokens.q, tokens.k, given.e, *given.states, *given.towards, tables.G, tables.read, d_q, d_k, found.x, found.d_p1,
        found.d_p2, found.d_a, found.d_e1, found.d_e2, d_tables.G, d_tables.read,
        call.tokens, call.heads, call.offset, group.first, group.tiles,
        DEPTH=call.depth, D=call.dim, F=call.hidden, BH=kernel.hidden if call.depth == 2 else call.dim, BT=call.tile, CHUNK=call.chunk,
        GATES=call.gates, NORM=call.residual_norm, TO_INITIAL=call.to_initial, num_warps=kernel.warps, num_stages=kernel.stages,
    )  # fmt: skip
    return found
