"""What the kernels share: where a tile lies, products, and the pieces of the memory network.

Names: BT tokens of a tile, D head size, n = b * H + h a head of the batch. All arithmetic but the products is in float32.

A tile covers the positions [start, start + BT) of the call, of which those outside [0, T) do not exist: the first tile of a call
that goes on in a half-read chunk may start before 0. Rows that do not exist hold zeros.
"""

import triton
import triton.language as tl

# The interpreter wants a constant on the right of what it multiplies.
LN_EPS = tl.constexpr(1e-6)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def dot(a, b, acc=None):
    """a @ b + acc in float32. Operands in float32 keep its precision on tensor cores."""
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def tile_start(tile, offset, BT: tl.constexpr):
    """Position in the call of a tile's first row. Tiles count from the start of the call's first chunk, `offset` tokens before 0."""
    return tile * BT - offset


@triton.jit
def opens_chunk(tile, offset, CHUNK: tl.constexpr, BT: tl.constexpr):
    """Is this tile the first of its chunk, in this call?"""
    return (tile % (CHUNK // BT) == 0) & (tile * BT >= offset)


@triton.jit
def rows_that_exist(start, tokens, BT: tl.constexpr):
    """[BT] bool."""
    position = start + tl.arange(0, BT)
    return (position >= 0) & (position < tokens)


@triton.jit
def token_index(n, start, tokens, heads):
    """Of head n's token `start` in [B, T, H], int64."""
    return ((n // heads).to(tl.int64) * tokens + start) * heads + n % heads


@triton.jit
def load_tokens(x, n, start, tokens, heads, column, BT: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Rows of a tile of x [B, T, H, D], columns [column, column + WIDTH): [BT, WIDTH] in float32."""
    offsets = tl.arange(0, BT)[:, None] * (heads * D) + tl.arange(0, WIDTH)[None, :]
    exists = rows_that_exist(start, tokens, BT)
    pointers = x + token_index(n, start, tokens, heads) * D + column + offsets
    return tl.load(pointers, mask=exists[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_tokens(x, value, n, start, tokens, heads, column, BT: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """The inverse of load_tokens, in x's dtype."""
    offsets = tl.arange(0, BT)[:, None] * (heads * D) + tl.arange(0, WIDTH)[None, :]
    exists = rows_that_exist(start, tokens, BT)
    pointers = x + token_index(n, start, tokens, heads) * D + column + offsets
    tl.store(pointers, value.to(x.dtype.element_ty), mask=exists[:, None])


@triton.jit
def gelu(z):
    """gelu_tanh(z)."""
    half, _ = _tanh_parts(_bounded(z))
    return z * half


@triton.jit
def gelu_and_slope(z):
    """gelu_tanh(z) and its derivative. Formulas: chunked/network.py."""
    x = _bounded(z)
    half, s = _tanh_parts(x)
    return z * half, half + 0.5 * s * z * _inner_slope(x)


@triton.jit
def gelu_derivatives(z):
    """gelu_tanh(z), its first and its second derivative."""
    x = _bounded(z)
    half, s = _tanh_parts(x)
    slope = _inner_slope(x)
    second = s * (2 * slope - SQRT_2_OVER_PI - z * (2 * half - 1) * slope * slope)
    return z * half, half + 0.5 * s * z * slope, second


@triton.jit
def _bounded(z):
    """Beyond 12 the tanh is 1 in float32, and the cube of a large z would overflow."""
    return tl.minimum(tl.maximum(z, -12.0), 12.0)


@triton.jit
def _tanh_parts(x):
    """(1 + tanh u) / 2 and 1 - tanh(u)^2 at the activation's u(x), neither by a difference of near numbers."""
    u = x * SQRT_2_OVER_PI * (1 + x * x * CUBIC)
    small = tl.exp(-2 * tl.abs(u))
    large = 1 / (1 + small)
    small *= large
    return tl.where(u < 0, small, large), 4 * small * large


@triton.jit
def _inner_slope(x):
    return (1 + x * x * (3 * CUBIC)) * SQRT_2_OVER_PI


@triton.jit
def layer_norm(z, D: tl.constexpr):
    """Normalised z [BT, D] and 1 / std [BT]; no affine."""
    centred = z - (tl.sum(z, 1) / D)[:, None]
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + LN_EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def layer_norm_vjp(g, n, rstd, D: tl.constexpr):
    """The norm's Jacobian, which is symmetric, times g [BT, D]. n, rstd: of layer_norm."""
    mean = tl.sum(g, 1) / D
    along = tl.sum(g * n, 1) / D
    return (g - mean[:, None] - n * along[:, None]) * rstd[:, None]


@triton.jit
def damping_factor(rstd, eps):
    """s^2 / (s^2 + eps) with s = 1 / rstd."""
    return 1 / (1 + eps * rstd * rstd)
