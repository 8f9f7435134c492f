"""bfloat16 tensors, float32 sums: against a float32 run on the same rounded inputs, by RMS(err) / RMS(ref).

Rounding one result to bfloat16 costs 1.7e-3. Each bound lies between that, or what the products' own rounding adds to it, and what
the same code gives with a sum in bfloat16 (measured, in the comments).
"""

import pytest
import torch

from titans_pretrain.kernels.attention import segment_attention, sliding_window_attention
from titans_pretrain.kernels.cross_entropy import linear_cross_entropy
from titans_pretrain.kernels.memory_scan import MemoryState, memory_read, memory_scan, memory_step, telescope
from titans_pretrain.kernels.short_conv import causal_conv

TOKENS = 4096


def rounded(*shapes, offset=0.0):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) + offset).to(torch.bfloat16) for shape in shapes]


def errors(call, inputs, cotangent=None):
    """Of the output and of each input's gradient: call's in bfloat16 against call's in float32."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        y = call(*leaves)
        d = torch.ones_like(y) if cotangent is None else cotangent.to(dtype)
        results.append((y, *torch.autograd.grad(y, leaves, d)))
    low, exact = ([x.detach().float() for x in result] for result in results)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(low, exact, strict=True)]


def test_attention_adds_the_gradients_of_its_blocks():
    """64 blocks add to each persistent key, 5 to each other one; in bfloat16 (y, q, k, v, pk, pv): the same, the same, 3.2e-3,
    2.9e-3, 8.6e-3, 9.6e-3."""
    token, kept = (1, TOKENS, 2, 16), (2, 2, 16)
    inputs = rounded(token, token, token, kept, kept)
    (cotangent,) = rounded(token, offset=1.0)

    def call(q, k, v, pk, pv):
        return sliding_window_attention(q, k, v, window=256, persistent=(pk, pv))[0]

    found = errors(call, inputs, cotangent)
    bounds = (2.8e-3, 3.0e-3, 2.8e-3, 2.4e-3, 3.5e-3, 3.0e-3)
    assert all(error < bound for error, bound in zip(found, bounds, strict=True)), found


def test_segment_attention_sums_its_scores_and_values():
    """One call over 1,024 keys; a softmax and a sum in bfloat16 would give 1e-2 and more."""
    shape = (1, 1024, 2, 16)
    found = errors(lambda q, k, v, h, w: segment_attention(q, k, v, h, w), rounded(*[shape] * 5))
    assert max(found) < 4e-3, found


def test_convolution_adds_its_taps():
    """Output and gradient of x: 1.7e-3, with taps added in bfloat16 2.4e-3. Gradient of the taps, a sum over all tokens: 5e-5,
    of which bfloat16 would make 1.7e-3."""
    inputs = rounded((2, TOKENS, 16), (16, 4), offset=1.0)
    (cotangent,) = rounded((2, TOKENS, 16), offset=1.0)
    x, weight = inputs

    def call(dtype):
        a, b = x.to(dtype).requires_grad_(), weight.float().requires_grad_()  # the parameter is float32
        y, _ = causal_conv(a, b)
        return [y, *torch.autograd.grad(y, (a, b), cotangent.to(dtype))]

    low, exact = call(torch.bfloat16), call(torch.float32)
    found = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(low, exact, strict=True)]
    assert found[0] < 2e-3 and found[1] < 2e-3 and found[2] < 2e-4, found


def test_cross_entropy_sums_its_losses_and_gradients():
    """Loss 1e-5 and gradient of the head 2.0e-3 (rounded to bfloat16 at the end), over 64 chunks of rows."""
    hidden, weight = rounded((TOKENS, 16), (64, 16))
    labels = torch.randint(64, (TOKENS,), generator=torch.Generator().manual_seed(0))
    found = errors(lambda h, w: linear_cross_entropy(h, w, labels, chunk_tokens=64)[0], (hidden, weight))
    assert found[0] < 1e-4 and found[1] < 5e-3 and found[2] < 2.6e-3, found


@pytest.mark.parametrize("call", ["scan", "reference", "step", "read", "telescope"])
def test_autocast_does_not_reach_the_memory(call):
    """Its state is float32 and so is all that touches it: to the bit what it is without autocast."""
    g = torch.Generator().manual_seed(0)
    tokens = 1 if call == "step" else 9
    q, k, v = torch.randn(3, 2, tokens, 2, 8, generator=g)
    forget, momentum, lr = 0.1 * torch.rand(3, 2, tokens, 2, 1, generator=g)
    state = MemoryState.initial((torch.randn(2, 8, 12, generator=g), torch.randn(2, 12, 8, generator=g)), 2)
    options = dict(chunk_size=4, residual_norm=True, damping=1.0)

    def run():
        if call == "read":
            return [memory_read(q, state, residual_norm=True)]
        if call == "telescope":
            return [telescope(lr, momentum, k, chunk_size=4, coefficient=1.2, power=2)[0]]
        if call == "step":
            y, new = memory_step(q, k, v, forget, momentum, lr, state, **options)
        else:
            backend = "auto" if call == "scan" else call
            y, new = memory_scan(q, k, v, forget, momentum, lr, state, backend=backend, **options)
        return [y, *new.weights, *new.surprise]

    exact = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
