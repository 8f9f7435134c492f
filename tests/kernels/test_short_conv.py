"""Short causal convolution against torch's conv1d and a loop: values, gradients, documents, splits, causality."""

import pytest
import torch
from torch.nn.functional import conv1d
from torch.testing import assert_close

from titans_pretrain.kernels.short_conv import causal_conv

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def make(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def compare(actual, expected, inputs):
    (cotangent,) = make(actual.shape, seed=9)
    assert_close(actual, expected, **EXACT)
    grads = zip(
        torch.autograd.grad(actual, inputs, cotangent, materialize_grads=True),
        torch.autograd.grad(expected, inputs, cotangent, materialize_grads=True),
        strict=True,
    )
    for got, wanted in grads:
        assert_close(got, wanted, **EXACT)


def oracle(x, weight, tail, positions, initial):
    """Token by token; a document's first tokens read `initial` where its own do not reach."""
    batch, tokens, _ = x.shape
    before = weight.shape[1] - 1
    rows = []
    for b in range(batch):
        start = initial[b % len(initial)] if initial is not None else torch.zeros_like(x[0, :1]).expand(before, -1)
        past = torch.cat((tail[b] if tail is not None else start, x[b]))
        row = []
        for t in range(tokens):
            reach = before if positions is None else min(before, max(int(positions[b, t]), 0))
            taps = torch.cat((start[reach:], past[before + t - reach : before + t + 1]))
            row.append((taps * weight.t()).sum(0))
        rows.append(torch.stack(row))
    return torch.stack(rows)


POSITIONS = torch.tensor([[7, 8, 0, 1, 2, 3, 4, 0, 0, 1, -1, -1, 0], [2, 0, 1, -1, 0, 1, 2, 3, 4, 5, 6, 0, 1]])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("docs", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("has_tail", [False, True], ids=["fresh", "tail"])
@pytest.mark.parametrize("initial_batch", [0, 1, 2])
def test_matches_the_rule(size, docs, has_tail, initial_batch):
    batch, tokens = POSITIONS.shape
    x, weight, tail, initial = make((batch, tokens, 5), (5, size), (batch, size - 1, 5), (initial_batch, size - 1, 5))
    used = (x, weight, tail if has_tail else None, POSITIONS if docs else None, initial if initial_batch else None)
    y, new_tail = causal_conv(x, weight, tail=used[2], positions=used[3], initial=used[4])
    compare(y, oracle(*used), [z for z in (x, weight, used[2], used[4]) if z is not None])
    assert new_tail.shape == tail.shape and torch.equal(new_tail, x[:, tokens - size + 1 :])


def test_matches_conv1d():
    x, weight = make((3, 29, 6), (6, 4))
    expected = conv1d(torch.cat((torch.zeros(3, 3, 6), x), 1).transpose(1, 2), weight[:, None], groups=6).transpose(
        1, 2
    )
    compare(causal_conv(x, weight)[0], expected, [x, weight])


@pytest.mark.parametrize("docs", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("cuts", [[1], [2, 9], list(range(1, 13))], ids=str)
def test_splits_with_tails_equal_one_call(cuts, docs):
    batch, tokens = POSITIONS.shape
    x, weight, initial = make((batch, tokens, 5), (5, 4), (1, 3, 5))
    positions = POSITIONS if docs else None
    whole = torch.cat(causal_conv(x, weight, positions=positions, initial=initial), 1)
    parts, tail = [], None
    for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
        part = None if positions is None else positions[:, start:stop]
        y, tail = causal_conv(x[:, start:stop], weight, tail=tail, positions=part, initial=initial)
        parts.append(y)
    compare(torch.cat((*parts, tail), 1), whole, [x, weight, initial])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("docs", [False, True], ids=["one", "documents"])
def test_rows_before_a_change_and_other_samples_are_bit_identical(docs, dtype):
    x, weight, initial = make((2, 13, 8), (8, 4), (1, 3, 8), dtype=dtype)
    options = {"positions": POSITIONS if docs else None, "initial": initial}
    with torch.no_grad():
        before, _ = causal_conv(x, weight, **options)
        x[1, 5] += 3.0
        after, _ = causal_conv(x, weight, **options)
    assert torch.equal(before[:, :5], after[:, :5]) and torch.equal(before[0], after[0])
    assert not torch.equal(before[1, 5], after[1, 5])


def test_the_tail_owns_its_memory():
    x, weight = make((2, 50, 4), (4, 4))
    _, tail = causal_conv(x, weight)
    assert tail.untyped_storage().nbytes() == tail.numel() * tail.element_size()


def test_bfloat16_input_with_float32_weight():
    x, weight, initial = make((2, 13, 8), (8, 4), (1, 3, 8), dtype=torch.float32)
    exact = causal_conv(x, weight, positions=POSITIONS, initial=initial)[0]
    y = causal_conv(x.to(torch.bfloat16), weight, positions=POSITIONS, initial=initial)[0]
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), (x, weight, initial))
    wanted = torch.autograd.grad(exact.square().sum(), (x, weight, initial))
    for got, want in zip((y, *grads), (exact, *wanted), strict=True):
        assert (got.float() - want).square().mean().sqrt() < 2e-2 * want.square().mean().sqrt()


@pytest.mark.parametrize(
    "message, changes",
    [
        ("x must be [B, T, C]", {"x": torch.zeros(2, 0, 4)}),
        ("x must be a floating", {"x": torch.zeros(2, 5, 4, dtype=torch.int64)}),
        ("weight is", {"weight": torch.zeros(5, 4)}),
        ("tail is", {"tail": torch.zeros(2, 2, 4)}),
        ("positions is", {"positions": torch.zeros(2, 5)}),
        ("initial is", {"initial": torch.zeros(3, 3, 4)}),
    ],
)
def test_bad_input_is_named_in_one_line(message, changes):
    with pytest.raises(ValueError) as error:
        causal_conv(**({"x": torch.zeros(2, 5, 4), "weight": torch.zeros(4, 4)} | changes))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
