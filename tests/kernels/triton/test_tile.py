"""What the kernels share: offsets beyond 2^31 elements, the activation where it saturates."""

import pytest
import torch
import triton
import triton.language as tl
from scan_compared import DEVICE

from titans_pretrain.kernels.memory_scan.chunked.network import gelu_derivatives as derivatives_in_torch
from titans_pretrain.kernels.memory_scan.triton.tile import (
    gelu,
    gelu_and_slope,
    gelu_derivatives,
    opens_chunk,
    rows_that_exist,
    tile_start,
    token_index,
)


@triton.jit
def index_kernel(out, n, start, tokens, heads, D: tl.constexpr):
    tl.store(out, token_index(n, start, tokens, heads) * D)


@pytest.mark.parametrize("n, start", [(47, 2_097_120), (24, -16), (0, 2_097_151)])
def test_a_long_sequence_does_not_overflow(n, start):
    tokens, heads, dim = 2_097_152, 24, 128
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    index_kernel[(1,)](out, n, start, tokens, heads, D=dim)
    assert out.item() == ((n // heads * tokens + start) * heads + n % heads) * dim


@triton.jit
def gelu_kernel(z, out, SIZE: tl.constexpr):
    x = tl.load(z + tl.arange(0, SIZE))
    at = out + tl.arange(0, SIZE)
    y, slope = gelu_and_slope(x)
    values, first, second = gelu_derivatives(x)
    tl.store(at, gelu(x))
    tl.store(at + SIZE, y)
    tl.store(at + 2 * SIZE, slope)
    tl.store(at + 3 * SIZE, values)
    tl.store(at + 4 * SIZE, first)
    tl.store(at + 5 * SIZE, second)


def test_gelu_and_its_derivatives():
    z = torch.cat([torch.linspace(-9, 9, 120), torch.tensor([-1e30, -1e4, -20.0, 0.0, 20.0, 1e4, 1e30, float("nan")])])
    out = torch.empty(6, len(z), device=DEVICE)
    gelu_kernel[(1,)](z.to(DEVICE), out, SIZE=len(z))
    exact = z.double().clamp(-50, 50)  # torch's own tanh form overflows
    first, second = derivatives_in_torch(exact)
    values = torch.nn.functional.gelu(exact, approximate="tanh") * (z.double() / exact).nan_to_num(1.0)
    for found, wanted in zip(out.cpu(), (values, values, first, values, first, second), strict=True):
        assert found[-1].isnan()
        torch.testing.assert_close(found[:-1].double(), wanted[:-1], rtol=1e-6, atol=1e-6)


@triton.jit
def tile_kernel(out, tile, offset, tokens, CHUNK: tl.constexpr, BT: tl.constexpr):
    start = tile_start(tile, offset, BT)
    tl.store(out, opens_chunk(tile, offset, CHUNK, BT).to(tl.int32))
    tl.store(out + 1 + tl.arange(0, BT), rows_that_exist(start, tokens, BT).to(tl.int32))


@pytest.mark.parametrize("offset, tokens, tile, opens, rows", [
    (0, 40, 0, True, (0, 16)),
    (5, 40, 0, False, (5, 16)),  # the call goes on in a tile
    (16, 40, 1, False, (0, 16)),  # and here at a tile's start, within a chunk
    (5, 40, 2, True, (0, 13)),
    (0, 3, 0, True, (0, 3)),
])  # fmt: skip
def test_where_a_tile_lies(offset, tokens, tile, opens, rows):
    out = torch.empty(17, dtype=torch.int32, device=DEVICE)
    tile_kernel[(1,)](out, tile, offset, tokens, CHUNK=32, BT=16)
    wanted = [int(opens), *(int(rows[0] <= r < rows[1]) for r in range(16))]
    assert out.tolist() == wanted
