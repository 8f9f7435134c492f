"""The adjoint of the decay tables: gradients of the gates (README.md one folder up, "Gates"). A program is a tile of a head and gate.

Neither logarithm nor division: the decay matrices are products once more, so alpha = 1 and eta = 0 are exact.
"""

import triton
import triton.language as tl
from torch import Tensor

from titans_pretrain.kernels.memory_scan.triton.tile import dot, rows_that_exist, tile_start, token_index


@triton.jit
def tables_back_kernel(
    forget, momentum, lr, G, read, d_G, d_read, d_last, d_carry, d_forget, d_momentum, d_lr, first, tiles, offset, tokens, heads,
    GATES: tl.constexpr, DEPTH: tl.constexpr, SLICES: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile, head_gate = program % tiles, (program // tiles).to(tl.int64)
    n, gate = head_gate // GATES, head_gate % GATES
    start = tile_start(first + tile, offset, BT)
    t = tl.arange(0, BT)
    row, column = t[:, None], t[None, :]
    last = tl.minimum(BT, tokens - start) - 1

    # What is missing neither forgets nor writes; the row before each row is loaded as such, which needs no shift in registers.
    exists = rows_that_exist(start, tokens, BT)
    before = exists & (start + t > 0) & (t > 0)
    gates = (token_index(n, start, tokens, heads) + t * heads) * GATES + gate
    keep = 1 - tl.load(forget + gates, mask=exists, other=0.0).to(tl.float32)
    eta = tl.load(momentum + gates, mask=exists, other=1.0).to(tl.float32)
    eta_before = tl.load(momentum + gates - heads * GATES, mask=before, other=1.0).to(tl.float32)
    theta = tl.load(lr + gates, mask=exists, other=0.0).to(tl.float32)
    at = head_gate * tiles + tile
    square = at * BT * BT + row * BT + column
    G_before = tl.load(G + square - BT, mask=before[:, None], other=0.0)
    pairs = read + at * BT * 2 + t * 2
    beta_before = tl.load(pairs - 2, mask=before, other=1.0)
    f_before = tl.load(pairs - 1, mask=before, other=0.0)
    m_before = tl.cumprod(eta_before, 0)

    # The write's and the carry's gradients: those of a tile's last rows, from every memory layer of this gate and slice of F.
    d_last_G, d_last_N = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    d_beta_last, d_f_last, d_m_last = 0.0, 0.0, 0.0
    for layer in tl.static_range(DEPTH // GATES):
        for j in range(SLICES):
            part = ((n * DEPTH + gate + layer) * SLICES + j) * tiles + tile
            d_last_G += tl.load(d_last + part * BT * 2 + t * 2)
            d_last_N += tl.load(d_last + part * BT * 2 + t * 2 + 1)
            d_beta_last += tl.load(d_carry + part * 4)
            d_f_last += tl.load(d_carry + part * 4 + 1)
            d_m_last += tl.load(d_carry + part * 4 + 2)
    is_last = t == last
    d_rows = tl.load(d_G + square) + tl.where(is_last[:, None], d_last_G[None, :], 0.0)
    d_pairs = d_read + at * BT * 2 + t * 2
    d_beta = tl.load(d_pairs) + tl.where(is_last, d_beta_last, 0.0)
    d_f = tl.load(d_pairs + 1) + tl.where(is_last, d_f_last, 0.0)

    decay = _transposed_decay(keep, BT)
    lam = tl.where(row >= column, dot(decay, d_rows), 0.0)
    lam_beta = tl.sum(decay * d_beta[None, :], 1)
    lam_f = tl.sum(decay * d_f[None, :], 1)
    d_alpha = -(tl.sum(lam * G_before, 1) + lam_beta * beta_before + lam_f * f_before)
    tl.store(d_forget + gates, d_alpha, mask=exists)

    lam += tl.where(is_last[:, None] & (row >= column), d_last_N[None, :], 0.0)
    lam_f += tl.where(is_last, d_m_last, 0.0)
    decay = _transposed_decay(eta, BT)
    mu = dot(decay, lam)
    mu_m = tl.sum(decay * lam_f[None, :], 1)
    N_before = tl.where(row > column, tl.cumprod(tl.where(row - 1 > column, eta_before[:, None], 1.0), 0), 0.0) * theta
    tl.store(d_momentum + gates, tl.sum(mu * N_before, 1) + mu_m * m_before, mask=exists)
    tl.store(d_lr + gates, tl.sum(tl.where(row == column, mu, 0.0), 1), mask=exists)


@triton.jit
def _transposed_decay(x, BT: tl.constexpr):
    """L[t,i] = prod_{i<s<=t} x_s for i <= t, as [i, t]."""
    i, t = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return tl.where(t >= i, tl.cumprod(tl.where(t > i, x[None, :], 1.0), 1), 0.0)


def tables_back(
    gates: tuple[Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor], d_tables: tuple[Tensor, Tensor, Tensor, Tensor],
    d_gates: tuple[Tensor, Tensor, Tensor], *, first: int, offset: int, warps: int = 4,
) -> None:  # fmt: skip
    """Fills d_gates where the tiles' tokens are; G gates (1, or as many as memory layers), N = B * H heads, all contiguous.

    gates: forget, momentum, lr [B, T, H, G]; d_gates: their gradients, float32
    tables: G [N, G, tiles, BT, BT] and read [N, G, tiles, BT, 2] of the tiles, float32
    d_tables: of G and read likewise, of last [N, L, slices of F, tiles, BT, 2] and of carry [N, L, slices of F, tiles, 4]
    first: of the tiles, counted from the start of the call's first chunk, `offset` tokens before position 0
    """
    d_last = d_tables[2]
    _, depth, slices, tiles, BT, _ = d_last.shape
    _, tokens, heads, sets = gates[0].shape
    tables_back_kernel[(len(d_last) * sets * tiles,)](
        *gates, *tables, *d_tables, *d_gates, first, tiles, offset, tokens, heads, sets, depth, slices, BT, num_warps=warps, num_stages=1
    )  # fmt: skip
