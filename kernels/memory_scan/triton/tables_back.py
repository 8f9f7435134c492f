"""The adjoint of the decay tables: gradients of the gates (README.md one folder up, "Gates"). A program is a tile of a head and gate.

Neither logarithm nor division: the decay matrices are products once more, so alpha = 1 and eta = 0 are exact.
"""

import triton
import triton.language as tl
from torch import Tensor

from titans_pretrain.kernels.memory_scan.triton.call import Call, Group, Tables, Tokens
from titans_pretrain.kernels.memory_scan.triton.tile import dot, rows_that_exist, tile_start, token_index


@triton.jit(do_not_specialize=["tokens", "heads", "offset", "first", "tiles"])
def tables_back_kernel(
    forget, momentum, lr, G, read, d_G, d_read, d_last, d_carry, d_forget, d_momentum, d_lr, tokens, heads, offset, first,
    tiles, GATES: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Program (n * GATES + gate) * tiles + tile of the group."""
    program = tl.program_id(0)
    tile, head_gate = program % tiles, (program // tiles).to(tl.int64)
    n, gate = head_gate // GATES, head_gate % GATES
    start = tile_start(first + tile, offset, BT)
    t = tl.arange(0, BT)
    row = t[:, None]
    last = tl.minimum(BT, tokens - start) - 1

    # What is missing neither forgets nor writes; the row before each row is loaded as such, which needs no shift in registers.
    exists = rows_that_exist(start, tokens, BT)
    before = exists & (start + t > 0) & (t > 0)
    gates = token_index(n, start, tokens, heads) * GATES + gate
    mine = gates + t * (heads * GATES)
    keep = 1 - tl.load(forget + mine, mask=exists, other=0.0).to(tl.float32)
    eta = tl.load(momentum + mine, mask=exists, other=1.0).to(tl.float32)
    eta_before = tl.load(momentum + mine - heads * GATES, mask=before, other=1.0).to(tl.float32)
    at = head_gate * tiles + tile
    pairs = at * BT * 2 + t * 2
    is_last = t == last  # and what the state gave of a tile's last row

    decay = _transposed_decay(keep, BT)
    d_beta = tl.load(d_read + pairs) + tl.where(is_last, tl.load(d_carry + at * 4), 0.0)
    d_f = tl.load(d_read + pairs + 1) + tl.where(is_last, tl.load(d_carry + at * 4 + 1), 0.0)
    lam_beta, lam_f = tl.sum(decay * d_beta[None, :], 1), tl.sum(decay * d_f[None, :], 1)
    d_alpha = lam_beta * tl.load(read + pairs - 2, mask=before, other=1.0)
    d_alpha += lam_f * tl.load(read + pairs - 1, mask=before, other=0.0)
    lam_f += tl.where(is_last, tl.load(d_carry + at * 4 + 2), 0.0)
    decay = _transposed_decay(eta, BT)
    d_eta = tl.sum(decay * lam_f[None, :], 1) * tl.cumprod(eta_before, 0)
    d_theta = tl.zeros([BT], tl.float32)

    COLUMNS: tl.constexpr = min(BT, 32)  # at a time: so that a thread's registers suffice
    for first_column in tl.range(0, BT, COLUMNS, num_stages=1, disable_licm=True):
        columns = first_column + tl.arange(0, COLUMNS)
        column = columns[None, :]
        square = at * BT * BT + row * BT + column
        of_columns = at * BT * 2 + columns * 2
        d_rows = tl.load(d_G + square) + tl.where(is_last[:, None], tl.load(d_last + of_columns)[None, :], 0.0)
        lam = tl.where(row >= column, dot(_transposed_decay(keep, BT), d_rows), 0.0)
        d_alpha += tl.sum(lam * tl.load(G + square - BT, mask=before[:, None], other=0.0), 1)
        lam += tl.where(is_last[:, None] & (row >= column), tl.load(d_last + of_columns + 1)[None, :], 0.0)
        mu = dot(_transposed_decay(eta, BT), lam)
        position = start + columns
        written = (position >= 0) & (position < tokens)
        theta = tl.load(lr + gates + columns * (heads * GATES), mask=written, other=0.0).to(tl.float32)
        decayed = tl.cumprod(tl.where(row - 1 > column, eta_before[:, None], 1.0), 0)
        d_eta += tl.sum(mu * tl.where(row > column, decayed, 0.0) * theta[None, :], 1)
        d_theta += tl.sum(tl.where(row == column, mu, 0.0), 1)
    tl.store(d_forget + mine, -d_alpha, mask=exists)
    tl.store(d_momentum + mine, d_eta, mask=exists)
    tl.store(d_lr + mine, d_theta, mask=exists)


@triton.jit
def _transposed_decay(x, BT: tl.constexpr):
    """L[t,i] = prod_{i<s<=t} x_s for i <= t, as [i, t]."""
    i, t = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return tl.where(t >= i, tl.cumprod(tl.where(t > i, x[None, :], 1.0), 1), 0.0)


def tables_back(
    call: Call, group: Group, tokens: Tokens, tables: Tables, d_tables: Tables, d_forget: Tensor, d_momentum: Tensor, d_lr: Tensor
) -> None:  # fmt: skip
    """Fills the group's tokens of the gates' gradients, float32 [B, T, H, G], from all of d_tables."""
    kernel = call.row.tables_back
    tables_back_kernel[(call.n * call.gates * group.tiles,)](
        tokens.forget, tokens.momentum, tokens.lr, tables.G, tables.read, *d_tables, d_forget, d_momentum, d_lr,
        call.tokens, call.heads, call.offset, group.first, group.tiles, GATES=call.gates, BT=call.tile,
        num_warps=kernel.warps, num_stages=kernel.stages,
    )  # fmt: skip
