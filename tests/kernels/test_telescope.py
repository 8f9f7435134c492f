"""The telescoped step against its formula, its splits, and what it is for."""

import pytest
import torch

from titans_pretrain.kernels.memory_scan import MemoryState, memory_scan, telescope


def inputs(tokens, gates=1):
    g = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(2, tokens, 2, 5, generator=g, dtype=torch.float64), dim=-1)
    lr, momentum = (torch.rand(2, tokens, 2, gates, generator=g, dtype=torch.float64) for _ in range(2))
    return lr, momentum, k


@pytest.mark.parametrize("gates, coefficient, power", [(1, 2.0, 1), (3, 2.0, 1), (1, 1.2, 2)])
def test_formula(gates, coefficient, power):
    lr, momentum, k = inputs(11, gates)
    out, _ = telescope(lr, momentum, k, chunk_size=4, coefficient=coefficient, power=power)
    expected = lr * (1 - momentum)
    for t in range(11):
        for j in range(t // 4 * 4, t):
            overlap = (k[:, t] * k[:, j]).sum(-1, keepdim=True).abs() ** power
            expected[:, t] *= 1 - (coefficient * lr[:, j] * overlap).clamp(max=0.999)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)


def test_split_invariance():
    lr, momentum, k = inputs(13)
    whole, last = telescope(lr, momentum, k, chunk_size=4)
    parts, history = [], None
    for start, stop in ((0, 1), (1, 3), (3, 10), (10, 13)):
        part, history = telescope(
            lr[:, start:stop], momentum[:, start:stop], k[:, start:stop], chunk_size=4, history=history
        )
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=0)
    assert torch.equal(history.keys, last.keys) and history.keys.shape[1] == 1
    assert telescope(lr[:, :12], momentum[:, :12], k[:, :12], chunk_size=4)[1] is None


def test_equal_keys_write_what_the_delta_rule_would():
    """A chunk of one repeated token moves a linear memory exactly as far as token-by-token steps (2 theta <= 0.999)."""
    k = torch.nn.functional.normalize(torch.ones(1, 8, 1, 4, dtype=torch.float64), dim=-1)
    v = torch.ones_like(k)
    lr = torch.full((1, 8, 1, 1), 0.3, dtype=torch.float64)
    none = torch.zeros_like(lr)
    start = MemoryState.initial((torch.zeros(1, 4, 4, dtype=torch.float64),), 1)
    _, exact = memory_scan(k, k, v, none, none, lr, start, chunk_size=1)
    steps, _ = telescope(lr, none, k, chunk_size=8)
    _, chunk = memory_scan(k, k, v, none, none, steps, start, chunk_size=8)
    torch.testing.assert_close(chunk.weights[0], exact.weights[0], rtol=1e-10, atol=0)


def test_autocast_does_not_reach_it():
    lr, momentum, k = (x.float() for x in inputs(11))
    exact, _ = telescope(lr, momentum, k, chunk_size=4, coefficient=0.8)
    with torch.autocast("cpu", torch.bfloat16):
        found, history = telescope(lr, momentum, k, chunk_size=4, coefficient=0.8)
    assert found.dtype == history.steps.dtype == torch.float32
    assert torch.equal(found, exact)


def test_split_invariance_of_a_coefficient():
    lr, momentum, k = inputs(13)
    options = dict(chunk_size=5, coefficient=0.8, power=2)
    whole, _ = telescope(lr, momentum, k, **options)
    first, history = telescope(lr[:, :7], momentum[:, :7], k[:, :7], **options)
    second, _ = telescope(lr[:, 7:], momentum[:, 7:], k[:, 7:], **options, history=history)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-12, atol=0)
    assert torch.equal(telescope(lr, momentum, k, chunk_size=5, coefficient=0.0)[0], lr * (1 - momentum))


def test_bad_input():
    lr, momentum, k = inputs(4)
    with pytest.raises(ValueError, match="lr is .* and k .*; they must be"):
        telescope(lr[:, :3], momentum, k, chunk_size=2)
    with pytest.raises(ValueError, match="the coefficient of telescope must be 0 or more, got -1"):
        telescope(lr, momentum, k, chunk_size=2, coefficient=-1)
    with pytest.raises(ValueError, match="power"):
        telescope(lr, momentum, k, chunk_size=2, power=3)


@pytest.mark.parametrize("power", [1, 2])
def test_gradients_by_finite_differences(power):
    """Of theta too through the factors that it puts on later tokens."""
    g = torch.Generator().manual_seed(3)
    lr, momentum = (0.1 + 0.3 * torch.rand(1, 5, 1, 1, generator=g, dtype=torch.float64) for _ in range(2))
    k = torch.nn.functional.normalize(torch.randn(1, 5, 1, 3, generator=g, dtype=torch.float64), dim=-1)
    inputs = [x.requires_grad_() for x in (lr, momentum, k)]
    assert torch.autograd.gradcheck(lambda *x: telescope(*x, chunk_size=3, power=power)[0], inputs)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("gates", [1, 3])
def test_the_adjoint_equals_automatic_differentiation(gates, power):
    """Of the same formula, with pairs that are clamped, and keys that are equal or at right angles."""
    from titans_pretrain.kernels.memory_scan.telescope import _telescoped

    lr, _, k = inputs(12, gates)
    k[:, 5], k[:, 6] = k[:, 4], torch.eye(5, dtype=torch.float64)[0]
    k[:, 7] = torch.eye(5, dtype=torch.float64)[1]
    lr = (3 * lr).requires_grad_()
    k.requires_grad_()
    weights = torch.randn(lr.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad((_telescoped(lr, k, 4, 1.2, power) * weights).sum(), (lr, k))
    out, _ = telescope(lr, torch.zeros_like(lr), k, chunk_size=4, coefficient=1.2, power=power)
    for found, wanted in zip(torch.autograd.grad((out * weights).sum(), (lr, k)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
