"""Sliding-window and segment attention against dense oracles: values, gradients, splits, documents, causality."""

import pytest
import torch
from attention_cases import EXACT, HEADS, SIZE, case, compare, documents, leaves, make, oracle
from torch.testing import assert_close

from titans_pretrain.kernels.attention import segment_attention, sliding_window_attention
from titans_pretrain.kernels.attention.sdpa import block_size


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("docs", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("window, tail", [(1, 0), (7, 0), (7, 6), (7, 2), (200, 5), (None, 0), (None, 9)])
def test_matches_the_rule(window, tail, persistent, docs, backend):
    tokens = 23
    inputs, options = case(tokens, tail=tail, persistent=persistent)
    positions = documents(2, tokens) if docs else None
    y, _ = sliding_window_attention(*inputs, window=window, positions=positions, backend=backend, **options)
    compare(y, oracle(*inputs, window=window, positions=positions, **options), leaves(inputs, options))


@pytest.mark.parametrize("docs", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("window, tail, persistent", [(5, 4, 2), (70, 33, 0), (300, 0, 3), (None, 0, 3), (None, 20, 0)])
def test_many_blocks_match_the_reference(window, tail, persistent, docs):
    tokens = 331
    assert tokens > 2 * block_size(window or tokens)
    inputs, options = case(tokens, tail=tail, persistent=persistent)
    options["positions"] = documents(2, tokens) if docs else None
    fast, fast_tail = sliding_window_attention(*inputs, window=window, backend="sdpa", **options)
    slow, slow_tail = sliding_window_attention(*inputs, window=window, backend="reference", **options)
    options.pop("positions")
    compare(fast, slow, leaves(inputs, options))
    assert all(torch.equal(a, b) for a, b in zip(fast_tail, slow_tail, strict=True))


@pytest.mark.parametrize("docs", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("window", [1, 9, 80, None])
@pytest.mark.parametrize("cuts", [[1], [64], [3, 4, 70, 130], list(range(1, 40))], ids=str)
def test_splits_with_tails_equal_one_call(window, cuts, docs):
    tokens = 150
    inputs, options = case(tokens, persistent=2)
    positions = documents(2, tokens) if docs else None
    whole, whole_tail = sliding_window_attention(*inputs, window=window, positions=positions, **options)
    parts, tail = [], None
    for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
        y, tail = sliding_window_attention(
            *(x[:, start:stop] for x in inputs),
            window=window,
            positions=None if positions is None else positions[:, start:stop],
            persistent=options["persistent"],
            tail=tail,
        )
        parts.append(y)
    # the tail takes part: what it carries onwards must be differentiable alike
    split, whole = (torch.cat((y, *t), 1) for y, t in ((torch.cat(parts, 1), tail), (whole, whole_tail)))
    compare(split, whole, leaves(inputs, options))


@pytest.mark.parametrize(
    "window, tail, tokens, kept", [(8, 0, 3, 3), (8, 7, 1, 7), (8, 2, 20, 7), (1, 0, 4, 0), (None, 5, 4, 9)]
)
def test_tail_is_the_last_keys_and_owns_its_memory(window, tail, tokens, kept):
    (q, k, v), options = case(tokens, tail=tail)
    _, new = sliding_window_attention(q, k, v, window=window, **options)
    for got, old, fresh in zip(new, options["tail"] or (k[:, :0], v[:, :0]), (k, v), strict=True):
        everything = torch.cat((old, fresh), 1)
        assert torch.equal(got, everything[:, everything.shape[1] - kept :])
        assert got.untyped_storage().nbytes() == got.numel() * got.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("docs", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("window, persistent", [(6, 2), (100, 0), (None, 0), (None, 2)])
def test_rows_before_a_change_and_other_samples_are_bit_identical(window, persistent, docs, dtype):
    tokens, at = 210, 101
    (q, k, v), options = case(tokens, batch=3, persistent=persistent, dtype=dtype)
    options["positions"] = documents(3, tokens) if docs else None
    with torch.no_grad():
        before, _ = sliding_window_attention(q, k, v, window=window, **options)
        for x in (q, k, v):
            x[1, at] += 3.0
        after, _ = sliding_window_attention(q, k, v, window=window, **options)
    assert torch.equal(before[:, :at], after[:, :at])
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1, at], after[1, at])


def test_padding_rows_are_finite_and_unseen():
    inputs, _ = case(90)
    positions = torch.cat((torch.arange(40), torch.full((20,), -1), torch.arange(30))).expand(2, -1)
    y, _ = sliding_window_attention(*inputs, window=64, positions=positions)
    alone, _ = sliding_window_attention(*(x[:, 60:] for x in inputs), window=64)
    assert torch.isfinite(y).all()
    assert_close(y[:, 60:], alone, **EXACT)


def test_bfloat16_and_autocast_stay_close_to_float32():
    inputs, options = case(200, tail=20, persistent=2, dtype=torch.float32)
    exact, _ = sliding_window_attention(*inputs, window=64, **options)
    exact_grads = torch.autograd.grad(exact.square().sum(), leaves(inputs, options))
    with torch.autocast("cpu", torch.bfloat16):
        y, (k, _) = sliding_window_attention(*inputs, window=64, **options)
    assert y.dtype == k.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), leaves(inputs, options))
    for got, wanted in zip((y, *grads), (exact, *exact_grads), strict=True):
        assert (got.float() - wanted).square().mean().sqrt() < 2e-2 * wanted.square().mean().sqrt()


def test_memory_is_linear_in_the_sequence():
    """No tensor of the call reaches a quarter of a T x T mask."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
            return out

    tokens = 4096
    inputs, options = case(tokens, batch=1, persistent=2, dtype=torch.float32)
    positions = torch.arange(tokens).remainder(1000)[None]
    with Largest() as largest:
        y, _ = sliding_window_attention(*inputs, window=64, positions=positions, **options)
        torch.autograd.grad(y.sum(), leaves(inputs, options))
    assert largest.elements <= 2 * inputs[0].numel() < tokens * tokens // 4


def segment_oracle(q, k, v, memory_k, memory_v, persistent, context):
    ys = []
    rows, length = q.shape[1], k.shape[1]
    for b in range(q.shape[0]):
        out = []
        for t in range(length - rows, length):
            keys, values = [k[b, : t + 1]], [v[b, : t + 1]]
            if memory_k is not None:
                keys, values = [memory_k[b, : t + 1], *keys], [memory_v[b, : t + 1], *values]
            if persistent is not None:
                keys, values = [persistent[0], *keys], [persistent[1], *values]
            if context is not None:
                keys, values = [context[0][b], *keys], [context[1][b], *values]
            weights = torch.einsum("hd,shd->hs", q[b, t - length + rows], torch.cat(keys)) * SIZE**-0.5
            out.append(torch.einsum("hs,shd->hd", weights.softmax(-1), torch.cat(values)))
        ys.append(torch.stack(out))
    return torch.stack(ys)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("persistent, context", [(0, 0), (3, 0), (0, 4), (3, 4)])
@pytest.mark.parametrize("rows, length", [(1, 1), (1, 9), (5, 11), (11, 11)])
def test_segment_matches_the_rule(rows, length, persistent, context, memory):
    row = (HEADS, SIZE)
    q, k, v, mk, mv, pk, pv, ck, cv = make(
        (2, rows, *row), *[(2, length, *row)] * 4, *[(persistent, *row)] * 2, *[(2, context, *row)] * 2
    )
    mk, mv = (mk, mv) if memory else (None, None)
    pairs = {"persistent": (pk, pv) if persistent else None, "context": (ck, cv) if context else None}
    inputs = [x for x in leaves((q, k, v, mk, mv), pairs) if x is not None]
    compare(segment_attention(q, k, v, mk, mv, **pairs), segment_oracle(q, k, v, mk, mv, **pairs), inputs)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_segments_of_unequal_lengths_match_the_rule(backend):
    length, lengths = 7, (7, 1, 4)
    row = (HEADS, SIZE)
    q, k, v, mk, mv, pk, pv, ck, cv = make(
        (3, 1, *row), *[(3, length, *row)] * 4, *[(2, *row)] * 2, *[(3, 2, *row)] * 2
    )
    y = segment_attention(
        q, k, v, mk, mv, persistent=(pk, pv), context=(ck, cv), lengths=torch.tensor(lengths), backend=backend
    )
    for i, n in enumerate(lengths):
        own = [x[i : i + 1, length - n :] for x in (k, v, mk, mv)]
        alone = segment_oracle(q[i : i + 1], *own, persistent=(pk, pv), context=(ck[i : i + 1], cv[i : i + 1]))
        assert_close(y[i : i + 1], alone, **EXACT)
    with pytest.raises(ValueError, match=r"lengths is \(2,\) torch.int64; it must be \(3,\)"):
        segment_attention(q, k, v, mk, mv, lengths=torch.tensor([1, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_is_causal_bit_for_bit(dtype):
    length, at = 40, 17
    tensors = make(*[(3, length, HEADS, SIZE)] * 5, dtype=dtype)
    with torch.no_grad():
        before = segment_attention(*tensors)
        for x in tensors:
            x[1, at] += 3.0
        after = segment_attention(*tensors)
    assert torch.equal(before[:, :at], after[:, :at]) and torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1, at], after[1, at])


BAD = {
    "q must be": {"q": torch.zeros(2, 0, HEADS, SIZE)},
    "q must be a floating": {"q": torch.zeros(2, 4, HEADS, SIZE, dtype=torch.int64)},
    "k is": {"k": torch.zeros(2, 5, HEADS, SIZE)},
    "v is": {"v": torch.zeros(2, 4, HEADS, SIZE, dtype=torch.float64)},
    "window must": {"window": 0},
    "positions is": {"positions": torch.zeros(2, 3, dtype=torch.int64)},
    "persistent v is": {"persistent": (torch.zeros(3, HEADS, SIZE), torch.zeros(2, HEADS, SIZE))},
    "tail k is": {"tail": (torch.zeros(1, 2, HEADS, SIZE),) * 2},
    "tail holds 3": {"tail": (torch.zeros(2, 3, HEADS, SIZE),) * 2},
    "sliding_window_attention: backend='flash' is not one of auto, flash_attn_3, flash_attn_2, aten, flash_attn_4, flex, sdpa": {
        "backend": "flash"
    },
    "document_multiple must": {"document_multiple": 0},
    "positions has documents": {"positions": torch.tensor([[0, 1, 2, 3], [2, 0, 1, 0]]), "document_multiple": 3},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named_in_one_line(message):
    x = torch.zeros(2, 4, HEADS, SIZE)
    with pytest.raises(ValueError) as error:
        sliding_window_attention(**({"q": x, "k": x, "v": x, "window": 3} | BAD[message]))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "message, changes",
    [
        ("q must be", {"q": torch.zeros(2, 0, HEADS, SIZE)}),
        ("k holds 3", {name: torch.zeros(2, 3, HEADS, SIZE) for name in ("k", "v", "memory_k", "memory_v")}),
        ("memory_k and memory_v", {"memory_v": None}),
        ("memory_v is", {"memory_v": torch.zeros(2, 5, HEADS, SIZE)}),
        ("persistent is", {"persistent": (torch.zeros(3, HEADS, 7),) * 2}),
        ("context is", {"context": (torch.zeros(1, 3, HEADS, SIZE),) * 2}),
    ],
)
def test_bad_segment_is_named_in_one_line(message, changes):
    x = torch.zeros(2, 4, HEADS, SIZE)
    arguments = {"q": x, "k": x, "v": x, "memory_k": x, "memory_v": x} | changes
    with pytest.raises(ValueError) as error:
        segment_attention(**arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
