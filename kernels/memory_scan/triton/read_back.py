"""The adjoint of the reads: a program is a tile of a head, which needs no other (README.md one folder up, "Backward").

In two kernels, so that a thread's registers suffice. A result that is needed transposed on the left of a product goes through memory:
transposed in registers, triton before 3.7.1 miscompiles it on Hopper.
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
    load_pair,
    store_block,
    store_block_t,
    store_pair,
    store_tokens_t,
)
from titans_pretrain.kernels.memory_scan.triton.call import Call, Given, Group, ReadGradients, Tables, Tokens
from titans_pretrain.kernels.memory_scan.triton.tile import (
    dot,
    gelu_and_slope,
    layer_norm,
    layer_norm_vjp,
    load_tokens,
    store_tokens,
    tile_start,
)


@triton.jit(do_not_specialize=["tokens", "heads", "offset", "first", "tiles"])
def last_layer_kernel(
    d_y, q, k, e, kept, towards, G, read, d_q, d_k, d_p2, d_e2, masked1, d_overlap2, d_G, d_read, tokens, heads, offset, first, tiles,
    DEPTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, CHUNK: tl.constexpr,
    GATES: tl.constexpr, NORM: tl.constexpr, TO_INITIAL: tl.constexpr,
):  # fmt: skip
    """The read once more, up to y; back through the norm and to the last layer's deltas. Where depth is 1 that is all.

    Keeps, for hidden_kernel, G o q k^T of the first layer and G o d_p e^T of the last, [N, tiles, BT, BT] in the products' dtype.
    """
    tile, n = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    start = tile_start(first + tile, offset, BT)
    dt = kept[2].dtype.element_ty
    here = (n * (tiles + 1) + 1 + tile) * (D * F)
    anchor = (n * (tiles + 1) + anchor_slot(first + tile, first, offset, CHUNK, BT)) * (D * F)
    at = n * GATES * tiles + tile
    last = at + (GATES - 1) * tiles
    square = (n * tiles + tile) * BT

    e_rows = load_kept(e, n, start, tokens, BT, D)
    beta, f = load_pair(read, last, BT)
    if DEPTH == 2:
        q_rows = load_tokens(q, n, start, tokens, heads, 0, BT, D, D).to(dt)
        k_rows = load_tokens(k, n, start, tokens, heads, 0, BT, D, D).to(dt)
        beta1, f1 = load_pair(read, at, BT)
        masked = (load_block(G, at * BT, 0, BT, BT, BT) * dot(q_rows, tl.trans(k_rows))).to(dt)
        store_block(masked1, masked, square, 0, BT, BT, BT)
    z = tl.zeros([BT, D], tl.float32)
    overlap = tl.zeros([BT, BT], tl.float32)
    for column in tl.range(0, F, BH, num_stages=1, disable_licm=True):
        if DEPTH == 2:
            a, _, x, _ = _hidden(
                q_rows,
                k_rows,
                e_rows,
                masked,
                beta1,
                f1,
                kept,
                towards,
                here,
                anchor,
                n * (D * F),
                column,
                D,
                F,
                BH,
                TO_INITIAL,
            )
        else:
            x = load_tokens(q, n, start, tokens, heads, column, BT, BH, D)
            a = load_tokens(k, n, start, tokens, heads, column, BT, BH, D).to(dt)
        overlap = dot(x.to(dt), tl.trans(a), overlap)
        if NORM:
            z = dot((beta[:, None] * x).to(dt), load_block(kept[2] + here, column, 0, D, BH, D), z)
            z = dot((f[:, None] * x).to(dt), load_block(kept[3] + here, column, 0, D, BH, D), z)
            if TO_INITIAL:
                z = dot(x.to(dt), load_block(towards[1] + n * (D * F), column, 0, D, BH, D), z)
    mask = load_block(G, last * BT, 0, BT, BT, BT)
    masked = (mask * overlap).to(dt)
    d_p = load_tokens(d_y, n, start, tokens, heads, 0, BT, D, D)
    if NORM:
        normed, rstd = layer_norm(z - dot(masked, e_rows), D)
        d_p = layer_norm_vjp(d_p, normed, rstd, D)
    store_block(d_p2, d_p, square, 0, D, BT, D)
    tl.debug_barrier()  # what is computed is loaded again, transposed
    d_p = load_block(d_p2, square, 0, D, BT, D)
    store_block_t(d_e2, -dot(load_block_t(d_p2, square, 0, D, BT, D), masked), square, 0, D, BT, D)
    along = dot(d_p, tl.trans(e_rows))
    store_block(d_G, -along * overlap, last * BT, 0, BT, BT, BT)
    d_overlap = (load_block(G, last * BT, 0, BT, BT, BT) * along).to(dt)
    if DEPTH == 2:
        store_block(d_overlap2, d_overlap, square, 0, BT, BT, BT)
    else:
        d_beta, d_f = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
        for column in tl.range(0, F, BH, num_stages=1, disable_licm=True):
            x = load_tokens(q, n, start, tokens, heads, column, BT, BH, D)
            d_x, d_beta_here, d_f_here = _through_state(
                d_p, x, beta, f, kept, towards, here, n * (D * F), column, D, BH, TO_INITIAL
            )
            d_beta += d_beta_here
            d_f += d_f_here
            d_x -= dot(d_overlap, load_tokens(k, n, start, tokens, heads, column, BT, BH, D).to(dt))
            if NORM:
                d_x += load_tokens(d_y, n, start, tokens, heads, column, BT, BH, D)
            store_tokens(d_q, d_x, n, start, tokens, heads, column, BT, BH, D)
            store_tokens_t(d_k, -dot(tl.trans(x.to(dt)), d_overlap), n, start, tokens, heads, column, BT, BH, D)
        store_pair(d_read, last, d_beta, d_f, BT)


@triton.jit(do_not_specialize=["tokens", "heads", "offset", "first", "tiles"])
def hidden_kernel(
    d_y, q, k, e, kept, towards, G, read, d_q, d_k, x_out, d_p1, d_p2, d_a, d_e1, masked1, d_overlap2, d_G, d_read, tokens, heads,
    offset, first, tiles, D: tl.constexpr, F: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, CHUNK: tl.constexpr,
    GATES: tl.constexpr, NORM: tl.constexpr, TO_INITIAL: tl.constexpr,
):  # fmt: skip
    """From the gradient before the norm, d_p2, through the last layer and the first to q, k and what they meet. Depth 2."""
    tile, n = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    start = tile_start(first + tile, offset, BT)
    dt = kept[2].dtype.element_ty
    here = (n * (tiles + 1) + 1 + tile) * (D * F)
    anchor = (n * (tiles + 1) + anchor_slot(first + tile, first, offset, CHUNK, BT)) * (D * F)
    initial = n * (D * F)
    at = n * GATES * tiles + tile
    last = at + (GATES - 1) * tiles
    rows = (n * tiles + tile) * BT

    q_rows = load_tokens(q, n, start, tokens, heads, 0, BT, D, D).to(dt)
    k_rows = load_tokens(k, n, start, tokens, heads, 0, BT, D, D).to(dt)
    e_rows = load_kept(e, n, start, tokens, BT, D)
    d_p = load_block(d_p2, rows, 0, D, BT, D)
    masked = load_block(masked1, rows, 0, BT, BT, BT)
    masked_t = load_block_t(masked1, rows, 0, BT, BT, BT)
    d_overlap = load_block(d_overlap2, rows, 0, BT, BT, BT)
    d_overlap_t = load_block_t(d_overlap2, rows, 0, BT, BT, BT)
    beta, f = load_pair(read, last, BT)
    beta1, f1 = load_pair(read, at, BT)
    d_beta, d_f = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    d_beta1, d_f1 = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    along = tl.zeros([BT, BT], tl.float32)
    d_q_rows = tl.zeros([BT, D], tl.float32)
    for column in tl.range(0, F, BH, num_stages=1, disable_licm=True):
        a, e1, x, slope = _hidden(
            q_rows,
            k_rows,
            e_rows,
            masked,
            beta1,
            f1,
            kept,
            towards,
            here,
            anchor,
            initial,
            column,
            D,
            F,
            BH,
            TO_INITIAL,
        )
        d_x, d_beta_here, d_f_here = _through_state(
            d_p, x, beta, f, kept, towards, here, initial, column, D, BH, TO_INITIAL
        )
        d_beta += d_beta_here
        d_f += d_f_here
        d_z = ((d_x - dot(d_overlap, a)) * slope).to(dt)
        store_block(x_out, x, rows, column, F, BT, BH)
        store_block(d_p1, d_z, rows, column, F, BT, BH)
        store_block(d_a, -dot(d_overlap_t, x.to(dt)), rows, column, F, BT, BH)
        store_block(d_e1, -dot(masked_t, d_z), rows, column, F, BT, BH)
        along = dot(d_z, tl.trans(e1), along)
        V, S = load_block(kept[0] + here, 0, column, F, D, BH), load_block(kept[1] + here, 0, column, F, D, BH)
        d_z = d_z.to(tl.float32)
        d_beta1 += tl.sum(d_z * dot(q_rows, V), 1)
        d_f1 += tl.sum(d_z * dot(q_rows, S), 1)
        d_q_rows = dot((beta1[:, None] * d_z).to(dt), tl.trans(V), d_q_rows)
        d_q_rows = dot((f1[:, None] * d_z).to(dt), tl.trans(S), d_q_rows)
        if TO_INITIAL:
            d_q_rows = dot(d_z.to(dt), load_block_t(towards[0] + initial, 0, column, F, D, BH), d_q_rows)

    d_overlap = (load_block(G, at * BT, 0, BT, BT, BT) * along).to(dt)
    d_q_rows -= dot(d_overlap, k_rows)
    if NORM:
        d_q_rows += load_tokens(d_y, n, start, tokens, heads, 0, BT, D, D)
    store_tokens(d_q, d_q_rows, n, start, tokens, heads, 0, BT, D, D)
    store_tokens_t(d_k, -dot(tl.trans(q_rows), d_overlap), n, start, tokens, heads, 0, BT, D, D)
    d_mask = -along * dot(q_rows, tl.trans(k_rows))
    if GATES == 2:
        store_pair(d_read, last, d_beta, d_f, BT)
    else:  # one gate: both layers'
        d_mask += load_block(d_G, at * BT, 0, BT, BT, BT)
        d_beta1 += d_beta
        d_f1 += d_f
    store_block(d_G, d_mask, at * BT, 0, BT, BT, BT)
    store_pair(d_read, at, d_beta1, d_f1, BT)


@triton.jit
def _through_state(
    d_p, x, beta, f, kept, towards, here, initial, column, D: tl.constexpr, BH: tl.constexpr, TO_INITIAL: tl.constexpr
):
    """The adjoint of beta o (x V) + f o (x S) + x T, at BH columns of x: gradients of x, beta and f."""
    through_V = dot(d_p, load_block_t(kept[2] + here, column, 0, D, BH, D))
    through_S = dot(d_p, load_block_t(kept[3] + here, column, 0, D, BH, D))
    d_x = beta[:, None] * through_V + f[:, None] * through_S
    if TO_INITIAL:
        d_x = dot(d_p, load_block_t(towards[1] + initial, column, 0, D, BH, D), d_x)
    return d_x, tl.sum(x * through_V, 1), tl.sum(x * through_S, 1)


@triton.jit
def _hidden(
    q, k, e, masked, beta, f, kept, towards, here, anchor, initial, column,
    D: tl.constexpr, F: tl.constexpr, BH: tl.constexpr, TO_INITIAL: tl.constexpr,
):  # fmt: skip
    """BH columns of a_1 and e_1, at the anchor, and of the read's x_1 = gelu(p_1), with gelu'(p_1)."""
    dt = q.dtype
    W1 = load_block(kept[0] + anchor, 0, column, F, D, BH)
    W2_t = load_block_t(kept[2] + anchor, column, 0, D, BH, D)
    V = load_block(kept[0] + here, 0, column, F, D, BH)
    S = load_block(kept[1] + here, 0, column, F, D, BH)
    p = beta[:, None] * dot(q, V) + f[:, None] * dot(q, S)
    if TO_INITIAL:
        T = load_block(towards[0] + initial, 0, column, F, D, BH)
        p = dot(q, T, p)
        W1 = (W1.to(tl.float32) + T.to(tl.float32)).to(dt)
        W2_t = (W2_t.to(tl.float32) + load_block_t(towards[1] + initial, column, 0, D, BH, D).to(tl.float32)).to(dt)
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
    masked, d_overlap = (new(call.tile if inner else 0, call.dtype) for _ in range(2))
    given_of_both = (d_y, tokens.q, tokens.k, given.e, given.states, given.towards, tables.G, tables.read, d_q, d_k)
    numbers = (call.tokens, call.heads, call.offset, group.first, group.tiles)
    options = dict(
        D=call.dim, F=call.hidden, BH=kernel.hidden, BT=call.tile, CHUNK=call.chunk, GATES=call.gates,
        NORM=call.residual_norm, TO_INITIAL=call.to_initial, num_warps=kernel.warps, num_stages=kernel.stages,
    )  # fmt: skip
    grid = (call.n * group.tiles,)
    last_layer_kernel[grid](
        *given_of_both,
        found.d_p2,
        found.d_e2,
        masked,
        d_overlap,
        d_tables.G,
        d_tables.read,
        *numbers,
        DEPTH=call.depth,
        **options,
    )
    if call.depth == 2:
        hidden_kernel[grid](
            *given_of_both, *found[:5], masked, d_overlap, d_tables.G, d_tables.read, *numbers, **options
        )
    return found
