"""The reads of a group, all tiles at once, from the states that the walk kept."""

import triton
import triton.language as tl
from torch import Tensor

from titans_pretrain.kernels.memory_scan.triton.blocks import anchor_slot
from titans_pretrain.kernels.memory_scan.triton.call import Call, Given, Group, Tables, Tokens
from titans_pretrain.kernels.memory_scan.triton.matrices import anchored, first_matrix, last_matrix, moved
from titans_pretrain.kernels.memory_scan.triton.tile import (
    dot,
    gelu,
    gelu_and_slope,
    layer_norm,
    load_tokens,
    store_tokens,
    tile_start,
)


@triton.jit
def load_read(read, place, BT: tl.constexpr):
    """beta and f [BT] of a tile."""
    rows = read + place * (2 * BT) + 2 * tl.arange(0, BT)
    return tl.load(rows), tl.load(rows + 1)


@triton.jit
def load_mask(masks, place, BT: tl.constexpr):
    """G [BT, BT] of a tile."""
    return tl.load(masks + place * (BT * BT) + tl.arange(0, BT)[:, None] * BT + tl.arange(0, BT)[None, :])


@triton.jit(do_not_specialize=["tokens", "heads", "offset", "group_first", "tiles"])
def read_kernel(
    q, k, masks, read, kept, towards, e_in, y_out, tokens, heads, offset, group_first, tiles, DEPTH: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, BH: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr, GATES: tl.constexpr, NORM: tl.constexpr,
    TO_INITIAL: tl.constexpr,
):  # fmt: skip
    """Program n * tiles + tile of the group."""
    n, in_group = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    tile = group_first + in_group
    start = tile_start(tile, offset, BT)
    dt = e_in.dtype.element_ty
    place = (n.to(tl.int64) * GATES + GATES - 1) * tiles + in_group
    state = moved(kept, (n.to(tl.int64) * (tiles + 1) + 1 + in_group) * (D * F))
    anchor = (n.to(tl.int64) * (tiles + 1) + anchor_slot(tile, group_first, offset, CHUNK, BT)) * (D * F)
    goal = n.to(tl.int64) * (D * F)

    queries = load_tokens(q, n, start, tokens, heads, 0, BT, D, D).to(dt)
    keys = load_tokens(k, n, start, tokens, heads, 0, BT, D, D).to(dt)
    e = load_tokens(e_in, n, start, tokens, 1, 0, BT, D, D).to(dt)
    overlap = dot(queries, tl.trans(keys))
    beta, f = load_read(read, place, BT)
    if DEPTH == 2:
        beta1, f1 = load_read(read, place - (GATES - 1) * tiles, BT)
        masked = (-load_mask(masks, place - (GATES - 1) * tiles, BT) * overlap).to(dt)
        overlap = tl.zeros([BT, BT], tl.float32)  # of the last layer's inputs: summed below
    y = tl.zeros([BT, D], tl.float32)
    for j in tl.range(0, F // BH, num_stages=1, disable_licm=True):
        at1, at2 = first_matrix(j, D, F, BH), last_matrix(j, D, BH)
        if DEPTH == 2:
            a, slope = gelu_and_slope(dot(keys, anchored(kept[0] + anchor + at1, towards[0] + goal + at1, TO_INITIAL)))
            a2 = anchored(kept[2] + anchor + at2, towards[1] + goal + at2, TO_INITIAL)
            e1 = (dot(e, tl.trans(a2)) * slope).to(dt)
            x = beta1[:, None] * dot(queries, tl.load(state[0] + at1))
            x += f1[:, None] * dot(queries, tl.load(state[1] + at1))
            if TO_INITIAL:
                x = dot(queries, tl.load(towards[0] + goal + at1), x)
            x = gelu(dot(masked, e1, x))
            overlap = dot(x.to(dt), tl.trans(a.to(dt)), overlap)
        else:
            x = load_tokens(q, n, start, tokens, heads, j * BH, BT, BH, D)
        tl.debug_barrier()
        y = dot((beta[:, None] * x).to(dt), tl.load(state[2] + at2), y)
        y = dot((f[:, None] * x).to(dt), tl.load(state[3] + at2), y)
        if TO_INITIAL:
            y = dot(x.to(dt), tl.load(towards[1] + goal + at2), y)
    tl.debug_barrier()  # what was loaded is loaded again, rather than kept in registers meanwhile
    y = dot((-load_mask(masks, place, BT) * overlap).to(dt), e, y)
    if NORM:
        y = load_tokens(q, n, start, tokens, heads, 0, BT, D, D) + layer_norm(y, D)[0]
    store_tokens(y_out, y, n, start, tokens, heads, 0, BT, D, D)


def read(call: Call, group: Group, x: Tokens, tables: Tables, given: Given, y: Tensor) -> None:
    """Fills the group's rows of y [B, T, H, D]."""
    kernel = call.row.read
    read_kernel[(call.n * group.tiles,)](
        x.q, x.k, tables.G, tables.read, given.states, given.towards, given.e, y, call.tokens, call.heads, call.offset, group.first,
        group.tiles, DEPTH=call.depth, D=call.dim, F=call.hidden, BH=kernel.hidden, CHUNK=call.chunk, BT=call.tile,
        GATES=call.gates, NORM=call.residual_norm, TO_INITIAL=call.to_initial, num_warps=kernel.warps, num_stages=kernel.stages,
    )  # fmt: skip
