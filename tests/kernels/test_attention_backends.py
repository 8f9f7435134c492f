"""The backends for a GPU, on a CPU: flash kernels by stand-ins that keep each library's contract, FlexAttention itself, uncompiled."""

import contextlib
import dataclasses
import shutil
import sys

import pytest
import torch
from attention_cases import HEADS, case, compare, documents, leaves, make
from flash_stand_ins import installed
from torch.nn.attention import flex_attention

from titans_pretrain.kernels.attention import (
    contract,
    flash,
    flex,
    libraries,
    segment_attention,
    sliding_window_attention,
)
from titans_pretrain.kernels.attention.documents import alone, document_span, most_sequences
from titans_pretrain.kernels.backends import serves_all

FLASH = [x.name for x in libraries.LIBRARIES]
BACKENDS = [*FLASH, "flex"]


@pytest.fixture
def served(monkeypatch):
    """Makes a backend serve calls here, with a stand-in for its library where it has one."""
    with contextlib.ExitStack() as stack:

        def serve(name):
            for table in ("WINDOW", "SEGMENT"):
                backends = tuple(dataclasses.replace(b, refuses=serves_all) for b in getattr(contract, table))
                monkeypatch.setattr(contract, table, backends)
            if name == "flex":  # refuses gradients on a CPU, and traces every call again; neither matters here
                monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
                monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
            else:
                stack.enter_context(installed(name, monkeypatch))
            return name

        yield serve


def check(backend, tokens, *, window, positions=None, multiple=1, **shape):
    inputs, options = case(tokens, **shape)
    options |= {"positions": positions, "window": window, "document_multiple": multiple}
    fast, fast_tail = sliding_window_attention(*inputs, backend=backend, **options)
    slow, slow_tail = sliding_window_attention(*inputs, backend="reference", **options)
    tensors = leaves(inputs, {name: options[name] for name in ("tail", "persistent")})
    compare(fast, slow, tensors)
    assert all(torch.equal(a, b) for a, b in zip(fast_tail, slow_tail, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("docs", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize(
    "window, tail", [(1, 0), (2, 0), (2, 1), (7, 0), (7, 6), (7, 2), (23, 0), (200, 5), (None, 0), (None, 9)]
)
def test_window(window, tail, persistent, docs, backend, served):
    tokens = 23
    check(
        served(backend), tokens, window=window, tail=tail, persistent=persistent,
        positions=documents(2, tokens) if docs else None,
    )  # fmt: skip


def row(*lengths, tokens, first=0):
    """Positions: documents of these lengths one after the other, a negative length of padding; first: where the first goes on."""
    positions = [x for n in lengths for x in ([-1] * -n if n < 0 else range(n))]
    positions[: max(lengths[0], 0)] = range(first, first + max(lengths[0], 0))
    assert len(positions) == tokens
    return positions


W = 6
ROWS = {
    "one token each": [row(*[1] * 20, tokens=20), row(1, 1, 18, tokens=20)],
    "as long as the window, and one less": [row(W, W - 1, W, 3, tokens=20), row(W - 1, W, W, 3, tokens=20)],
    "one token among long ones": [row(7, 1, 7, 1, 4, tokens=20), row(1, 18, 1, tokens=20)],
    "left padding": [row(-5, 15, tokens=20), row(-1, 1, 18, tokens=20)],
    "right padding": [row(15, -5, tokens=20), row(18, 1, -1, tokens=20)],
    "padding between": [row(4, -3, 5, -1, 1, -6, tokens=20), row(3, -17, tokens=20)],
    "padding alone": [row(-20, tokens=20), row(20, tokens=20)],
    "from the tail": [row(9, 11, tokens=20, first=30), row(1, 19, tokens=20, first=2)],
    "from the middle of the tail": [row(9, 11, tokens=20, first=3), row(20, tokens=20, first=1)],
    "behind a tail that is another's": [row(9, 11, tokens=20), row(-20, tokens=20)],
}


@pytest.mark.parametrize("backend", ["flash_attn_4", "flex"])  # the flash kernels' sequences are made alike for all
@pytest.mark.parametrize("tail", [0, W - 1])
@pytest.mark.parametrize("window", [W, None])
@pytest.mark.parametrize("name", ROWS)
def test_documents(name, window, tail, backend, served):
    check(served(backend), 20, window=window, tail=tail, persistent=2, positions=torch.tensor(ROWS[name]))


@pytest.mark.parametrize("backend", FLASH)
@pytest.mark.parametrize("multiple", [2, 8])
def test_documents_on_a_grid(multiple, backend, served):
    """As many as the bound allows, and fewer; and a call that starts between two places of the grid."""
    tokens = 67
    full = [x for _ in range(-(-tokens // multiple)) for x in range(multiple)]
    few = [*range(4, 4 + multiple), *range(multiple - 1), -1, *range(70)]
    shifted, most = [*range(5, 4 + multiple), *full], [5, *full]
    positions = torch.tensor([x[:tokens] for x in (full, few, shifted, most)])
    check(served(backend), tokens, batch=4, window=9, tail=3, persistent=1, positions=positions, multiple=multiple)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [64, 128])
def test_real_sizes_of_heads(size, backend, served):
    check(served(backend), 33, batch=1, window=8, tail=3, persistent=2, size=size, positions=documents(1, 33))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_few_tokens(tokens, backend, served):
    served(backend)
    for positions in (None, [9, 10, 11], [0, 1, 2], [-1, -1, -1], [4, 0, 1], [-1, 0, 1], [0, 0, 0]):
        where = None if positions is None else torch.tensor([positions[:tokens]])
        for tail in (0, 4):
            check(backend, tokens, batch=1, window=5, tail=tail, persistent=1, positions=where)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("persistent, context", [(0, 0), (3, 0), (0, 4), (3, 4)])
@pytest.mark.parametrize("rows, length", [(1, 1), (1, 9), (5, 11), (11, 11)])
def test_segment(rows, length, persistent, context, memory, backend, served):
    served(backend)
    shape = (HEADS, 6)
    q, k, v, mk, mv, pk, pv, ck, cv = make(
        (2, rows, *shape), *[(2, length, *shape)] * 4, *[(persistent, *shape)] * 2, *[(2, context, *shape)] * 2
    )
    mk, mv = (mk, mv) if memory else (None, None)
    pairs = {"persistent": (pk, pv) if persistent else None, "context": (ck, cv) if context else None}
    inputs = [x for x in leaves((q, k, v, mk, mv), pairs) if x is not None]
    fast, slow = (segment_attention(q, k, v, mk, mv, backend=name, **pairs) for name in (backend, "reference"))
    compare(fast, slow, inputs)


def test_torch_compile_takes_a_merged_call_whole(served):
    """Documents and persistent keys, forward and backward; the stand-ins of the other libraries cannot be traced."""
    served("aten")
    inputs, options = case(40, tail=5, persistent=3)
    tensors = leaves(inputs, options)

    def call(q, k, v, tk, tv, pk, pv, positions):
        return sliding_window_attention(
            q, k, v, window=8, positions=positions, tail=(tk, tv), persistent=(pk, pv), backend="aten"
        )[0]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    compare(compiled(*tensors, documents(2, 40)), call(*tensors, documents(2, 40)), tensors)


@pytest.mark.parametrize("backend", FLASH)
@pytest.mark.parametrize("docs", [False, True], ids=["one", "documents"])
def test_half_precision(docs, backend, served):
    """Within the tolerances of kernels in bfloat16: RMS 5e-3 for outputs, 1e-2 for gradients."""
    served(backend)
    inputs, options = case(200, tail=20, persistent=5, dtype=torch.float32)
    rounded = [x.detach().bfloat16() for x in leaves(inputs, options)]
    positions = documents(2, 200) if docs else None

    def run(name, dtype):
        q, k, v, *pairs = tensors = [x.to(dtype).requires_grad_() for x in rounded]
        tail, persistent = pairs[:2], pairs[2:]
        y, _ = sliding_window_attention(
            q, k, v, window=64, positions=positions, tail=tail, persistent=persistent, backend=name
        )
        return [y, *torch.autograd.grad(y.square().sum(), tensors)]

    for n, (low, exact) in enumerate(zip(run(backend, torch.bfloat16), run("reference", torch.float64), strict=True)):
        assert low.dtype == torch.bfloat16
        error = (low.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < (1e-2 if n else 5e-3), n


@pytest.mark.parametrize("seed", range(5))
def test_sequences_are_as_many_as_foretold_and_hold_a_document_each(seed):
    batch, tokens, tail = 3, 41, 7
    limit = documents(batch, tokens, seed=seed).clamp(min=0)
    span = document_span(limit, tail, tail + tokens, 1)
    assert len(span.queries) == len(span.keys) == most_sequences(batch, tokens, 1) + 1
    queries, keys, single = span.queries.tolist(), span.keys.tolist(), alone(limit).flatten()
    assert (queries[0], queries[-1], keys[0], keys[-1]) == (0, batch * tokens, 0, batch * (tail + tokens))
    found = 0
    for start, stop, first, last in zip(queries, queries[1:], keys, keys[1:], strict=False):
        for i in range(start, stop):
            if not single[i]:  # what it sees begins with its sequence
                seen = last - first - (stop - i - 1)
                assert seen == 1 + min(int(limit.flatten()[i]), i % tokens + tail)
                found += 1
    assert found == int((~single).sum()) > 0


@pytest.mark.parametrize("docs", ["one", "documents", "any"])
@pytest.mark.parametrize(
    "tokens, tail, window", [(700, 0, 200), (700, 199, 200), (128, 5, 1), (513, 300, 10_000), (40, 0, 7)]
)
def test_flex_lists_every_block_with_a_visible_key(tokens, tail, window, docs):
    """For queries and for keys, in order, each once; and where no document starts, no other block. `any`: limits of no document."""
    total = tail + tokens
    limit = documents(2, tokens).clamp(min=0) if docs != "one" else None
    if docs == "any":  # one token of a late block reaches back before all others
        limit = torch.randint(0, 3, (2, tokens), generator=torch.Generator().manual_seed(0))
        limit[:, tokens * 5 // 6] = total
    mask = flex.window_mask(2, tokens, total, min(window, total), limit, torch.device("cpu"))
    i, j = torch.arange(tokens)[:, None], torch.arange(total)
    back = i + tail - j
    seen = ((back >= 0) & (back < window)).expand(2, -1, -1)
    if limit is not None:
        seen = seen & (back <= limit[..., None])
    assert torch.equal(mask.mask_mod(torch.arange(2)[:, None, None], 0, i[None], j[None, None]).expand_as(seen), seen)
    padded = torch.nn.functional.pad(seen, (0, -total % flex.BLOCK, 0, -tokens % flex.BLOCK))
    blocks = padded.unflatten(-1, (-1, flex.BLOCK)).any(-1).unflatten(1, (-1, flex.BLOCK)).any(2)
    for number, indices, wanted in (
        (mask.kv_num_blocks, mask.kv_indices, blocks), (mask.q_num_blocks, mask.q_indices, blocks.mT)
    ):  # fmt: skip
        assert number.dtype == indices.dtype == torch.int32 and number.is_contiguous() and indices.is_contiguous()
        for b in range(2):
            for r, columns in enumerate(wanted[b]):
                n = int(number[b % len(number), 0, r])
                listed = indices[b % len(indices), 0, r, :n].tolist()
                assert n == len(listed) and sorted(set(listed)) == listed
                needed = columns.nonzero().flatten().tolist()
                assert set(needed) <= set(listed)
                assert limit is not None or listed == needed


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("docs", [False, True], ids=["one", "documents"])
def test_flex_compiled_visits_the_listed_blocks(docs):
    """What torch compiles for a CPU has no lse and no backward pass, but goes by the lists."""
    tokens, tail, window = 400, 100, 350  # as long as the kernel for CPUs wants the lists: as there are blocks
    inputs, options = case(tokens, tail=tail, dtype=torch.float32, size=32)
    positions = documents(2, tokens) if docs else None
    with torch.no_grad():
        slow, (k, v) = sliding_window_attention(
            *inputs, window=None, positions=positions, backend="reference", **options
        )
        slow, _ = sliding_window_attention(*inputs, window=window, positions=positions, backend="reference", **options)
        limit = None if positions is None else positions.clamp(min=0)
        mask = flex.window_mask(2, tokens, tail + tokens, window, limit, k.device)
        assert mask.kv_num_blocks.amin() < mask.kv_indices.shape[-1]
        q, k, v = (x.detach().transpose(1, 2) for x in (inputs[0], k, v))
        fast = torch.compile(flex_attention.flex_attention, fullgraph=True)(q, k, v, block_mask=mask).transpose(1, 2)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_flex_lists_are_linear_in_the_sequence():
    """2M tokens: a dense list would have 2^28 entries."""
    mask = flex.window_mask(1, 2**21, 2**21, 2048, None, torch.device("cpu"))
    assert max(x.numel() for x in (mask.kv_indices, mask.q_indices)) < 2**19


class OnGpu:
    """As much of a tensor as a backend looks at before it serves."""

    def __init__(self, *shape, dtype=torch.bfloat16, capability=(9, 0)):
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, torch.device("cuda", 0)
        self.capability = capability


@pytest.fixture
def gpu(monkeypatch):
    def make(*shape, capability=(9, 0), **options):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        return OnGpu(*shape, **options)

    return make


REFUSED = {
    "q: float32, and it has": {"dtype": torch.float32},
    "q: float64, and it has": {"dtype": torch.float64},
    "q: heads of 60": {"size": 60},
    "q: heads of 264": {"size": 264},
    "q: a GPU of compute capability 7.x": {"capability": (7, 5)},
}


@pytest.mark.parametrize("backend", FLASH)
@pytest.mark.parametrize("message", REFUSED)
def test_what_no_flash_kernel_has(message, backend, gpu, monkeypatch):
    options = dict(REFUSED[message])
    q = gpu(2, 64, 4, options.pop("size", 64), **options)
    with installed(backend, monkeypatch):
        assert refusal(contract.WINDOW, backend, q).startswith(message)
        assert refusal(contract.SEGMENT, backend, q).startswith(message)
        assert refusal(contract.WINDOW, backend, gpu(2, 64, 4, 64)) is None


def refusal(backends, name, q, limit=None, multiple=1):
    (backend,) = (b for b in backends if b.name == name)
    return backend.refuses(q=q, limit=limit, document_multiple=multiple)


@pytest.mark.parametrize("backend", FLASH[:2] + FLASH[3:])
def test_a_library_that_is_missing_or_old(backend, gpu, monkeypatch):
    q = gpu(2, 64, 4, 64)
    name, functions = {
        "flash_attn_2": (
            "flash_attn.flash_attn_interface",
            ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
        ),
        "flash_attn_3": ("flash_attn_interface", ("_flash_attn_forward", "_flash_attn_backward")),
        "flash_attn_4": ("flash_attn.cute.interface", ("_flash_attn_fwd", "_flash_attn_bwd")),
    }[backend]
    libraries._import.cache_clear()
    for part in ("flash_attn", "flash_attn.cute", name):
        monkeypatch.setitem(sys.modules, part, None)
    assert "or newer (ModuleNotFoundError: " in refusal(contract.WINDOW, backend, q)
    with installed(backend, monkeypatch):
        old = sys.modules[name]
        setattr(old, functions[1], lambda q, k, v, window_size: None)
        assert refusal(contract.WINDOW, backend, q).endswith(f"the {name} that is installed has other functions")
        delattr(old, functions[1])
        assert refusal(contract.WINDOW, backend, q).endswith("has other functions")


def test_operators_of_torch_are_asked_for_their_parameters():
    @torch.library.custom_op("titans_tests::window", mutates_args=())
    def operator(q: torch.Tensor, window_size_left: int) -> torch.Tensor:
        return q.clone()

    assert libraries._takes(operator, "window_size_left") and not libraries._takes(operator, "window_size")


def test_generations_of_gpus(gpu, monkeypatch):
    with contextlib.ExitStack() as stack:
        for name in FLASH:
            stack.enter_context(installed(name, monkeypatch))

        def serving(**options):
            q = gpu(2, 64, 4, options.pop("size", 64), **options)
            return [b.name for b in contract.WINDOW if b.refuses(q=q, limit=None, document_multiple=1) is None]

        assert serving(capability=(8, 0)) == ["flash_attn_2", "aten", "flex", "sdpa", "reference"]
        assert serving(capability=(9, 0)) == [*FLASH, "flex", "sdpa", "reference"]
        assert serving(capability=(10, 0)) == ["flash_attn_2", "aten", "flash_attn_4", "flex", "sdpa", "reference"]
        assert "flash_attn_4" not in serving(capability=(10, 0), size=192)
        assert serving(dtype=torch.float32) == ["sdpa", "reference"]


@pytest.mark.parametrize("backend", FLASH)
def test_documents_that_may_make_too_many_sequences(backend, gpu, monkeypatch):
    with installed(backend, monkeypatch):
        limit = torch.zeros(1, dtype=torch.int64)
        assert refusal(contract.WINDOW, backend, gpu(4, 4096, 16, 64), limit, 64) is None
        for shape, multiple in (((4, 4096, 16, 64), 16), ((1, 2**15, 16, 64), 64), ((4, 2048, 8, 64), 1)):
            assert refusal(contract.WINDOW, backend, gpu(*shape), limit, multiple).startswith(
                "positions: documents that start"
            )
            assert refusal(contract.WINDOW, backend, gpu(*shape)) is None
    assert refusal(contract.WINDOW, "flex", gpu(1, 2**15, 16, 64), limit) is None


def test_on_a_cpu_auto_is_sdpa_and_the_others_say_why():
    (q, k, v), _ = case(9)
    for name in BACKENDS:
        for call in (
            lambda name=name: sliding_window_attention(q, k, v, window=3, backend=name),
            lambda name=name: segment_attention(q, k, v, None, None, backend=name),
        ):
            with pytest.raises(ValueError, match=f"backend={name} cannot serve q: it is on cpu, [^\n]*$"):
                call()
    arguments = {"q": q, "limit": None, "document_multiple": 1}
    for table in (contract.WINDOW, contract.SEGMENT):
        assert next(b.name for b in table if b.refuses(**arguments) is None) == "sdpa"
    assert flash.refuses_segment(library=libraries.LIBRARIES[0], q=q)
