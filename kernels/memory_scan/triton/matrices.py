"""Matrices of the state in memory: where a program's part lies, and how it is read and kept.

A state is the tuple (v1, s1, v2, s2) of call.py's Matrices, of pointers or of values. Where depth is 1 only the last two count.
"""

import triton
import triton.language as tl

from titans_pretrain.kernels.memory_scan.triton.blocks import anchor_slot


@triton.jit
def first_matrix(j, D: tl.constexpr, F: tl.constexpr, BH: tl.constexpr):
    """Offsets [D, BH] of columns j * BH .. of a first matrix [D, F]."""
    return tl.arange(0, D)[:, None] * F + (j * BH + tl.arange(0, BH))[None, :]


@triton.jit
def last_matrix(j, D: tl.constexpr, BH: tl.constexpr):
    """Offsets [BH, D] of rows j * BH .. of a last matrix [F, D]."""
    return (j * BH + tl.arange(0, BH))[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def last_matrix_transposed(j, D: tl.constexpr, BH: tl.constexpr):
    """The same, transposed."""
    return (j * BH + tl.arange(0, BH))[None, :] * D + tl.arange(0, D)[:, None]


@triton.jit
def load_state(x, at1, at2, DEPTH: tl.constexpr):
    """x: pointers to one head's matrices."""
    v2, s2 = tl.load(x[2] + at2), tl.load(x[3] + at2)
    if DEPTH == 1:
        return v2, s2, v2, s2
    return tl.load(x[0] + at1), tl.load(x[1] + at1), v2, s2


@triton.jit
def store_state(x, state, at1, at2, DEPTH: tl.constexpr):
    """The inverse of load_state, in x's dtype."""
    dt = x[2].dtype.element_ty
    tl.store(x[2] + at2, state[2].to(dt))
    tl.store(x[3] + at2, state[3].to(dt))
    if DEPTH == 2:
        tl.store(x[0] + at1, state[0].to(dt))
        tl.store(x[1] + at1, state[1].to(dt))


@triton.jit
def moved(x, offset):
    """Pointers to matrices, `offset` elements on."""
    return x[0] + offset, x[1] + offset, x[2] + offset, x[3] + offset


@triton.jit
def anchored(kept, towards, TO_INITIAL: tl.constexpr):
    """One matrix of an anchor, for products: as it is kept, or, where that is V, with W_init added. Pointers to its elements."""
    w = tl.load(kept)
    if TO_INITIAL:
        w = (w.to(tl.float32) + tl.load(towards).to(tl.float32)).to(w.dtype)
    return w


@triton.jit
def load_anchor(
    tile, n, at1, at2, kept, towards, offset, group_first, tiles, DEPTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    CHUNK: tl.constexpr, BT: tl.constexpr, TO_INITIAL: tl.constexpr,
):  # fmt: skip
    """W1 and the last W at the start of the tile's chunk, at these offsets, for products. kept: as call.py's Given.states."""
    slot = anchor_slot(tile, group_first, offset, CHUNK, BT)
    place, goal = (n.to(tl.int64) * (tiles + 1) + slot) * (D * F), n.to(tl.int64) * (D * F)
    a2 = anchored(kept[2] + place + at2, towards[1] + goal + at2, TO_INITIAL)
    a1 = a2
    if DEPTH == 2:
        a1 = anchored(kept[0] + place + at1, towards[0] + goal + at1, TO_INITIAL)
    return a1, a2
