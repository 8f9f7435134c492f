"""Decay tables of a group's tiles (README.md, "Dual form"), by products alone: alpha = 1 and eta = 0 are exact."""

import triton
import triton.language as tl

from titans_pretrain.kernels.memory_scan.triton.call import Call, Group, Tables, Tokens
from titans_pretrain.kernels.memory_scan.triton.tile import rows_that_exist, tile_start, token_index


@triton.jit
def load_gate(gate, n, g, start, tokens, heads, gates, inert, BT: tl.constexpr):
    """Rows of a tile of a gate [B, T, H, G]: [BT] in float32, `inert` where there is no token."""
    rows = tl.arange(0, BT)
    exists = rows_that_exist(start, tokens, BT)
    pointers = gate + token_index(n, start, tokens, heads) * gates + g + rows * (heads * gates)
    return tl.load(pointers, mask=exists, other=inert).to(tl.float32)


@triton.jit
def _then(x1, y1, x2, y2):
    """y -> x1 y + y1, and then y -> x2 y + y2."""
    return x1 * x2, x2 * y1 + y2


@triton.jit
def recurrence(x, added):
    """y_t = x_t y_{t-1} + added_t from y = 0, over the first axis."""
    return tl.associative_scan((x, added), 0, _then)[1]


@triton.jit(do_not_specialize=["tokens", "heads", "offset", "first", "tiles"])
def tables_kernel(
    forget, momentum, lr, masks, read, last, carry, tokens, heads, offset, first, tiles, GATES: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """Program (n * G + g) * tiles + tile of the group."""
    of_gate, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    n, g = of_gate // GATES, of_gate % GATES
    start = tile_start(first + tile, offset, BT)
    keep = 1 - load_gate(forget, n, g, start, tokens, heads, GATES, 0.0, BT)
    eta = load_gate(momentum, n, g, start, tokens, heads, GATES, 1.0, BT)
    exists = rows_that_exist(start, tokens, BT)
    row = tl.arange(0, BT)
    beta = tl.cumprod(keep, 0)
    m = tl.cumprod(eta, 0)
    # A row that does not exist adds nothing to G and f: the last row's values are then those of the last token.
    f = recurrence(keep, tl.where(exists, m, 0.0))
    at_end = row == BT - 1

    place = tl.program_id(0).to(tl.int64)
    COLUMNS: tl.constexpr = 16  # at a time: so that a thread's registers suffice
    for first_column in tl.range(0, BT, COLUMNS, num_stages=1, disable_licm=True):
        column = first_column + tl.arange(0, COLUMNS)
        written = (start + column >= 0) & (start + column < tokens)
        step = lr + token_index(n, start, tokens, heads) * GATES + g + column * (heads * GATES)
        theta = tl.load(step, mask=written, other=0.0).to(tl.float32)
        N = recurrence(
            tl.broadcast_to(eta[:, None], [BT, COLUMNS]), tl.where(row[:, None] == column[None, :], theta[None, :], 0.0)
        )
        G = recurrence(tl.broadcast_to(keep[:, None], [BT, COLUMNS]), tl.where(exists[:, None], N, 0.0))
        square = row[:, None] * BT + column[None, :]
        tl.store(masks + place * BT * BT + square, G)
        tl.store(last + place * BT * 2 + column * 2, tl.sum(tl.where(at_end[:, None], G, 0.0), 0))
        tl.store(last + place * BT * 2 + column * 2 + 1, tl.sum(tl.where(at_end[:, None], N, 0.0), 0))
    tl.store(read + place * BT * 2 + row * 2, beta)
    tl.store(read + place * BT * 2 + row * 2 + 1, f)
    tl.store(carry + place * 4, tl.sum(tl.where(at_end, beta, 0.0), 0))
    tl.store(carry + place * 4 + 1, tl.sum(tl.where(at_end, f, 0.0), 0))
    tl.store(carry + place * 4 + 2, tl.sum(tl.where(at_end, m, 0.0), 0))
    tl.store(carry + place * 4 + 3, 0.0)


def tables(call: Call, group: Group, x: Tokens) -> Tables:
    """Tables of a group's tiles."""
    found = Tables.empty(call, group, x.q.device)
    tables_kernel[(call.n * call.gates * group.tiles,)](
        x.forget, x.momentum, x.lr, *found, call.tokens, call.heads, call.offset, group.first, group.tiles,
        GATES=call.gates, BT=call.tile, num_warps=call.row.tables.warps, num_stages=call.row.tables.stages,
    )  # fmt: skip
    return found
