"""bfloat16 runs against float32 runs of the same rounded inputs: only products and results may be rounded, not the sums.

Rounding a result costs 0.0017 (RMS, relative). Each bound is a little above what is measured, and the last tests show that sums
in bfloat16 do not keep them.
"""

import pytest
import torch
from targets import targets

from titans_pretrain.kernels.attention import contract as attention
from titans_pretrain.kernels.attention import segment_attention, sliding_window_attention
from titans_pretrain.kernels.cross_entropy import contract as cross_entropy
from titans_pretrain.kernels.cross_entropy import linear_cross_entropy
from titans_pretrain.kernels.short_conv import causal_conv
from titans_pretrain.kernels.short_conv import contract as short_conv

ROUNDED = 0.0022  # outputs, and gradients that no rounded intermediate enters
THROUGH_SOFTMAX = 0.006  # gradients through a rounded softmax, whose terms cancel


def randn(*shapes, device="cpu", mean=0.0, seed=0):
    """bfloat16; a mean that is not zero makes sums grow."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=g) + mean).bfloat16().to(device) for shape in shapes]


def errors(call, inputs, cotangent=None):
    """Relative error (RMS) of the output and of each gradient of a bfloat16 run."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.detach().clone().to(dtype).requires_grad_() for x in inputs]
        y = call(*leaves)
        grads = torch.autograd.grad(y, leaves, None if cotangent is None else cotangent.to(y.dtype))
        found.append([y, *grads])
    return [relative(a, b) for a, b in zip(*found, strict=True)]


def relative(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def sdpa(backends):
    """The backend that serves float32 as well. How the flash ones are merged: test_attention_backends.py."""
    return targets([b for b in backends if b.name == "sdpa"])


@pytest.mark.parametrize("window", [256, None])
@pytest.mark.parametrize("device, backend", sdpa(attention.WINDOW))
def test_window_attention(window, device, backend):
    """Blocks of queries add to a key: all of them to a persistent one."""
    row, tokens = (2, 32), 4096 if window else 1500
    q, k, cotangent, v, *pair = randn(*[(1, tokens, *row)] * 4, *[(3, *row)] * 2, device=device)

    def call(q, k, v, *pair):
        return sliding_window_attention(q, k, v + 1, window=window, persistent=pair, backend=backend)[0]

    y, *grads = errors(call, [q, k, v, *pair], cotangent + 1)
    assert y < ROUNDED and max(grads) < THROUGH_SOFTMAX, (y, grads)
    assert grads[2] < 0.003 and grads[4] < 0.003, grads  # of values: sums over the queries of several blocks


@pytest.mark.parametrize("device, backend", sdpa(attention.SEGMENT))
def test_segment_attention(device, backend):
    *inputs, cotangent = randn(*[(1, 600, 2, 32)] * 6, device=device)
    y, *grads = errors(lambda *x: segment_attention(*x, backend=backend), inputs, cotangent + 1)
    assert y < ROUNDED and max(grads) < THROUGH_SOFTMAX, (y, grads)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("device, backend", targets(short_conv.BACKENDS))
def test_convolution(documents, device, backend):
    x, weight, initial, cotangent = randn((2, 3000, 16), (16, 4), (1, 3, 16), (2, 3000, 16), device=device)
    positions = torch.arange(3000, device=device).remainder(50).expand(2, -1) if documents else None

    def call(x, weight, initial):
        return causal_conv(x, weight, positions=positions, initial=initial, backend=backend)[0]

    y, *grads = errors(call, [x + 1, weight, initial + 1], cotangent + 1)
    assert y < ROUNDED and max(grads) < 0.0027, (y, grads)  # that of `initial` adds a few rounded parts


@pytest.mark.parametrize("device, backend", targets(cross_entropy.BACKENDS))
def test_cross_entropy(device, backend):
    hidden, weight = randn((3000, 32), (50, 32), device=device)
    labels = torch.randint(0, 50, (3000,), generator=torch.Generator().manual_seed(1)).to(device)

    def call(hidden, weight):
        loss, count = linear_cross_entropy(hidden, weight, labels, chunk_tokens=64, backend=backend)
        assert loss.dtype == torch.float32
        return loss / (count + 3)  # not a power of two

    loss, *grads = errors(call, [hidden, weight])
    assert loss < 1e-4 and max(grads) < THROUGH_SOFTMAX, (loss, grads)
    assert grads[1] < 0.003, grads  # of weight: a sum over 47 chunks


@pytest.mark.parametrize("device, backend", targets(cross_entropy.BACKENDS))
def test_the_scale_of_the_loss_is_not_rounded(device, backend):
    """1 / tokens multiplies all gradients alike: rounded to bfloat16, it would be a wrong step size."""
    leaves = [x.requires_grad_() for x in randn((600, 32), (50, 32), device=device)]
    labels = torch.randint(0, 50, (600,), generator=torch.Generator().manual_seed(1)).to(device)
    scale = 359 / 512  # halfway between two numbers of bfloat16, 0.3 % from both
    loss, _ = linear_cross_entropy(*leaves, labels, chunk_tokens=64, backend=backend)
    plain, scaled = (torch.autograd.grad(loss * x, leaves, retain_graph=True) for x in (1.0, scale))
    for a, b in zip(plain, scaled, strict=True):
        a, b = a.double(), b.double()
        assert abs(float((a * b).sum() / a.square().sum()) - scale) < 1e-3


def test_attention_summed_in_bfloat16_is_found():
    q, k, v = randn(*[(1, 1500, 2, 32)] * 3)
    scores = torch.einsum("bthd,bshd->bhts", q.float()[:, -1:], k.float()) * 32**-0.5
    products = scores.softmax(-1).mT.bfloat16() * (v + 1).transpose(1, 2)  # [B, H, S, D]
    total = torch.zeros_like(products[:, :, 0])
    for product in products.unbind(2):
        total += product
    assert relative(total, products.double().sum(2)) > 10 * ROUNDED


def test_convolution_summed_in_bfloat16_is_found():
    x, weight = randn((2, 3000, 16), (16, 4))
    y = torch.zeros_like(x)
    for i in range(4):
        y[:, 3 - i :] += (x + 1)[:, : 3000 - 3 + i] * weight[:, i]
    assert relative(y, causal_conv((x + 1).float(), weight.float())[0]) > 1.3 * ROUNDED
