"""Chunked cross-entropy against torch's over all logits: values, gradients, dtypes, ignored labels, memory."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from titans_pretrain.kernels.cross_entropy import linear_cross_entropy


def make(tokens=37, dim=8, vocab=19, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[::5] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 1024])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_matches_cross_entropy_of_all_logits(chunk, ignore_index):
    hidden, weight, labels = make()
    labels[labels == -100] = ignore_index
    loss, count = linear_cross_entropy(hidden, weight, labels, ignore_index=ignore_index, chunk_tokens=chunk)
    expected = cross_entropy(hidden @ weight.t(), labels, ignore_index=ignore_index, reduction="sum")
    assert count.dtype == torch.int64 and count == (labels != ignore_index).sum()
    assert_close(loss, expected, rtol=1e-12, atol=0)
    scale = 0.3  # the caller divides by a token count: the incoming gradient is not 1
    got = torch.autograd.grad(loss * scale, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(expected * scale, (hidden, weight)), strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_by_finite_differences_and_twice():
    hidden, weight, labels = make(tokens=6, dim=3, vocab=5)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, chunk_tokens=4)[0], (hidden, weight)
    )
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        assert torch.equal(a, b)


def test_only_one_needs_a_gradient_or_none():
    hidden, weight, labels = make()
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels)[0], (hidden, weight))
    loss, _ = linear_cross_entropy(hidden, weight.detach(), labels)
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], both[0])
    loss, _ = linear_cross_entropy(hidden.detach(), weight, labels)
    assert torch.equal(torch.autograd.grad(loss, weight)[0], both[1])
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels)[0], loss)


def test_all_ignored_is_zero_with_zero_gradients():
    hidden, weight, labels = make()
    loss, count = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert loss == 0 and count == 0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_bfloat16_sums_in_float32():
    """Without it 4096 summed losses of about 11 would be off by whole units, and small weight gradients lost."""
    hidden, weight, labels = make(tokens=4096, dim=16, vocab=64, dtype=torch.float32)
    expected = cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    wanted = torch.autograd.grad(expected, (hidden, weight))
    low = [x.detach().to(torch.bfloat16).requires_grad_() for x in (hidden, weight)]
    loss, _ = linear_cross_entropy(*low, labels, chunk_tokens=64)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=2e-3, atol=0)
    got = torch.autograd.grad(loss, low)
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    for a, b in zip(got, wanted, strict=True):
        assert (a.float() - b).square().mean().sqrt() < 2e-2 * b.square().mean().sqrt()


def test_autocast_takes_its_dtype_and_returns_the_parameters():
    hidden, weight, labels = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, labels)
    low, _ = linear_cross_entropy(hidden.to(torch.bfloat16), weight.to(torch.bfloat16), labels)
    assert loss.dtype == torch.float32 and torch.equal(loss, low)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, (hidden, weight)))


def test_logits_exist_for_one_chunk_only():
    hidden, weight, labels = make(tokens=512, dim=8, vocab=1000, dtype=torch.float32)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    with Largest() as largest:
        loss, _ = linear_cross_entropy(hidden, weight, labels, chunk_tokens=32)
        torch.autograd.grad(loss, (hidden, weight))
    assert largest.elements == 32 * 1000


@pytest.mark.parametrize("wrong", [19, -1, -101])
def test_a_label_out_of_range_is_named(wrong):
    hidden, weight, labels = make()
    labels[4] = wrong
    with pytest.raises(ValueError, match=f"labels holds {wrong}; legal are 0 to 18 and ignore_index=-100"):
        linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize(
    "message, changes",
    [
        ("hidden must be [N, D]", {"hidden": torch.zeros(0, 4)}),
        ("hidden must be a floating", {"hidden": torch.zeros(3, 4, dtype=torch.int64)}),
        ("weight is", {"weight": torch.zeros(5, 3)}),
        ("labels is", {"labels": torch.zeros(4, dtype=torch.int64)}),
        ("labels is", {"labels": torch.zeros(3)}),
        ("chunk_tokens must", {"chunk_tokens": 0}),
    ],
)
def test_bad_input_is_named_in_one_line(message, changes):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError) as error:
        linear_cross_entropy(**(arguments | changes))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
