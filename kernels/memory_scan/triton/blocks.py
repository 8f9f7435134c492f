"""Blocks of matrices in memory, by rows or transposed as they are loaded: that is free, and safe on the left of a product."""

import triton
import triton.language as tl

from titans_pretrain.kernels.memory_scan.triton.tile import rows_that_exist, token_index


@triton.jit
def load_block(x, row, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x[row : row + ROWS, column : column + COLUMNS] of a matrix of WIDTH columns."""
    offsets = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, COLUMNS)[None, :]
    return tl.load(x + row * WIDTH + column + offsets)


@triton.jit
def load_block_t(x, row, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The same transposed, [COLUMNS, ROWS]."""
    offsets = tl.arange(0, ROWS)[None, :] * WIDTH + tl.arange(0, COLUMNS)[:, None]
    return tl.load(x + row * WIDTH + column + offsets)


@triton.jit
def store_block(x, value, row, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of load_block, in x's dtype."""
    offsets = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, COLUMNS)[None, :]
    tl.store(x + row * WIDTH + column + offsets, value.to(x.dtype.element_ty))


@triton.jit
def store_block_t(x, value, row, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of load_block_t, in x's dtype."""
    offsets = tl.arange(0, ROWS)[None, :] * WIDTH + tl.arange(0, COLUMNS)[:, None]
    tl.store(x + row * WIDTH + column + offsets, value.to(x.dtype.element_ty))


@triton.jit
def load_kept(x, n, start, tokens, BT: tl.constexpr, D: tl.constexpr):
    """Rows of a tile of x [N, T, D], as they are; zeros where there is no token."""
    exists = rows_that_exist(start, tokens, BT)
    offsets = tl.arange(0, BT)[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(x + (n * tokens + start) * D + offsets, mask=exists[:, None], other=0.0)


@triton.jit
def load_tokens_t(x, n, start, tokens, heads, BT: tl.constexpr, D: tl.constexpr):
    """Rows of a tile of x [B, T, H, D], as they are, as [D, BT]; zeros where there is no token."""
    exists = rows_that_exist(start, tokens, BT)
    offsets = tl.arange(0, BT)[None, :] * (heads * D) + tl.arange(0, D)[:, None]
    return tl.load(x + token_index(n, start, tokens, heads) * D + offsets, mask=exists[None, :], other=0.0)


@triton.jit
def store_tokens_t(x, value, n, start, tokens, heads, column, BT: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns [column, column + WIDTH) of a tile's rows of x [B, T, H, D], from [WIDTH, BT], in x's dtype."""
    exists = rows_that_exist(start, tokens, BT)
    offsets = tl.arange(0, BT)[None, :] * (heads * D) + tl.arange(0, WIDTH)[:, None]
    pointers = x + token_index(n, start, tokens, heads) * D + column + offsets
    tl.store(pointers, value.to(x.dtype.element_ty), mask=exists[None, :])


@triton.jit
def load_pair(x, tile, BT: tl.constexpr):
    """Both columns of x[tile], x [tiles, BT, 2]."""
    pointers = x + (tile * BT + tl.arange(0, BT)) * 2
    return tl.load(pointers), tl.load(pointers + 1)


@triton.jit
def store_pair(x, tile, first, second, BT: tl.constexpr):
    """The inverse of load_pair."""
    pointers = x + (tile * BT + tl.arange(0, BT)) * 2
    tl.store(pointers, first)
    tl.store(pointers + 1, second)


@triton.jit
def anchor_slot(tile, first, offset, CHUNK: tl.constexpr, BT: tl.constexpr):
    """Where a group, whose first tile is `first`, keeps the anchor of a tile's chunk: with the states, at the tile that opened the
    chunk, or at 0 if an earlier call opened it."""
    opener = tile - tile % (CHUNK // BT)
    return tl.where(opener * BT >= offset, 1 + opener - first, 0)
