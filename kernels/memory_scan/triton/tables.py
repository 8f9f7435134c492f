"""Decay tables of a group's tiles (README.md, "Dual form"), by products alone: alpha = 1 and eta = 0 are exact."""

import triton
import triton.language as tl

from titans_pretrain.kernels.memory_scan.triton.call import Call, Group, Tables, Tokens
from titans_pretrain.kernels.memory_scan.triton.tile import dot, rows_that_exist, tile_start, token_index


@triton.jit
def load_gate(gate, n, g, start, tokens, heads, gates, inert, BT: tl.constexpr):
    """Rows of a tile of a gate [B, T, H, G]: [BT] in float32, `inert` where there is no token."""
    rows = tl.arange(0, BT)
    exists = rows_that_exist(start, tokens, BT)
    pointers = gate + token_index(n, start, tokens, heads) * gates + g + rows * (heads * gates)
    return tl.load(pointers, mask=exists, other=inert).to(tl.float32)


@triton.jit
def decay_matrix(x, BT: tl.constexpr):
    """[BT, BT]: prod_{i<s<=t} x_s at [t, i] for i <= t, 0 above the diagonal."""
    t = tl.arange(0, BT)[:, None]
    i = tl.arange(0, BT)[None, :]
    factors = tl.where(t > i, x[:, None], 1.0)
    return tl.where(t >= i, tl.cumprod(factors, 0), 0.0)


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
    theta = load_gate(lr, n, g, start, tokens, heads, GATES, 0.0, BT)
    exists = rows_that_exist(start, tokens, BT)
    row = tl.arange(0, BT)
    forget_decay = decay_matrix(keep, BT)
    # A row that does not exist adds nothing to G and f: the last row's values are then those of the last token.
    N = decay_matrix(eta, BT) * theta[None, :]
    added = tl.where(exists[:, None], N, 0.0)
    beta = tl.cumprod(keep, 0)
    m = tl.cumprod(eta, 0)
    f = tl.sum(forget_decay * tl.where(exists, m, 0.0)[None, :], 1)
    # The last rows drive the state: sums in float32, not products on tensor cores.
    at_end = row == BT - 1
    decay_to_end = tl.sum(tl.where(at_end[:, None], forget_decay, 0.0), 0)
    last_G = tl.sum(decay_to_end[:, None] * added, 0)
    last_N = tl.sum(tl.where(at_end[:, None], N, 0.0), 0)

    place = tl.program_id(0).to(tl.int64)
    square = row[:, None] * BT + row[None, :]
    tl.store(masks + place * BT * BT + square, dot(forget_decay, added))
    tl.store(read + place * BT * 2 + row * 2, beta)
    tl.store(read + place * BT * 2 + row * 2 + 1, f)
    tl.store(last + place * BT * 2 + row * 2, last_G)
    tl.store(last + place * BT * 2 + row * 2 + 1, last_N)
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
