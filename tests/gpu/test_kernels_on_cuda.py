"""The kernels on CUDA: against their oracles, against the CPU, in bfloat16, and without a wait for the device."""

import contextlib

import pytest
import torch
from scan_cases import TOKENS, assert_equal, compare, gradients, make, run, tensors

from titans_pretrain.kernels.attention import segment_attention, sliding_window_attention
from titans_pretrain.kernels.attention.contract import SEGMENT, WINDOW
from titans_pretrain.kernels.cross_entropy import linear_cross_entropy
from titans_pretrain.kernels.cross_entropy.contract import BACKENDS as CROSS_ENTROPY
from titans_pretrain.kernels.memory_scan.contract import SCAN
from titans_pretrain.kernels.short_conv import causal_conv
from titans_pretrain.kernels.short_conv.contract import BACKENDS as SHORT_CONV


def fast(backends):
    """Triton's kernels have tests of their own, with shapes that they serve (tests/kernels/triton)."""
    return [b.name for b in backends if b.name not in ("reference", "triton")]


@contextlib.contextmanager
def no_waiting(device):
    """Raises where the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode() if device == "cuda" else None
    if before is not None:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if before is not None:
            torch.cuda.set_sync_debug_mode(before)


def randn(*shapes, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def results(call, inputs, device, dtype, wait=True):
    """Outputs and gradients of `call` with inputs of this dtype, on the device."""
    leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    with contextlib.nullcontext() if wait else no_waiting(device):
        y = call(*leaves)
        grads = torch.autograd.grad(y.float().square().sum() if y.dim() else y, leaves)
    return [y, *grads]


def check(call, oracle, inputs, device, low, exact=True):
    """float64 equals the oracle (exact: the backend has it); bfloat16 stays near it and does not wait for the device."""
    if exact:
        expected = results(oracle, inputs, "cpu", torch.float64)
        for i, (a, b) in enumerate(zip(results(call, inputs, device, torch.float64), expected, strict=True)):
            assert_equal(a, b, name=f"float64, tensor {i}")
    rounded = [x.bfloat16() for x in inputs]
    results(call, rounded, device, torch.bfloat16)  # what is made once is made here
    found = results(call, rounded, device, torch.bfloat16, wait=False)
    for i, (a, b) in enumerate(zip(found, results(oracle, rounded, "cpu", torch.float64), strict=True)):
        assert_equal(a, b, low, f"bfloat16, tensor {i}")


@pytest.mark.parametrize("backend", fast(SCAN))
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk, tokens", [(1, 9), (16, 100), (67, 150)])
def test_scan(backend, depth, chunk, tokens, device):
    x = make(tokens, depth, seed=depth, device=device)
    reset = torch.zeros(2, -(-tokens // chunk), dtype=torch.bool, device=device)
    reset[1, -1] = True
    options = dict(chunk_size=chunk, residual_norm=True, damping=0.7, forget_to="initial", reset=reset)
    compare(x, depth, options, backend, dict(checkpoint_every=2))


@pytest.mark.parametrize("backend", fast(SCAN))
def test_scan_in_training_dtypes(backend, device):
    """bfloat16 tokens, float32 states and gates, against float64 on the CPU; nothing waits."""
    options = dict(chunk_size=16, residual_norm=True, damping=0.7, forget_to="initial")
    x = {n: t.detach().bfloat16() if n in TOKENS[:3] else t.detach().float() for n, t in make(1000, 2).items()}
    exact = {n: t.double().requires_grad_() for n, t in x.items()}
    expected = tensors(*run(exact, 2, "auto", **options))
    wanted = gradients(expected, exact)
    for wait in (True, False):
        low = {n: t.to(device).requires_grad_() for n, t in x.items()}
        with contextlib.nullcontext() if wait else no_waiting(device):
            found = tensors(*run(low, 2, backend, **options))
            total = sum(t.float().sum() for t in found)
            torch.autograd.grad(total, list(low.values()), retain_graph=True)
        grads = gradients(found, low)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_equal(a, b, 5e-3, f"output {i}")
    for n, d in grads.items():
        assert_equal(d, wanted[n], 1e-2 if n in TOKENS[:3] else 2e-2, n)


def serves_or_skips(backends, name, **arguments):
    """Skips where a library is not on this machine or has no kernel for it. -> whether the backend serves float64 as well."""
    (backend,) = (b for b in backends if b.name == name)
    if reason := backend.refuses(**arguments):
        pytest.skip(f"{name} cannot serve {reason}")
    return backend.refuses(**arguments | {"q": arguments["q"].double()}) is None


# As many tokens as make odd blocks; documents of 1, W - 1, W and W + 1 tokens, padding between and behind.
LENGTHS = (100, 1, 63, -5, 64, 65, 1, 20, -14)
PLACES = [p for n in LENGTHS for p in (range(n) if n > 0 else [-1] * -n)]


@pytest.mark.parametrize("backend", fast(WINDOW))
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window, persistent", [(64, 3), (64, 0), (1, 3), (None, 3), (None, 0)])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_window_attention(backend, window, documents, persistent, size, device):
    row, tail = (2, size), min(9, (window or 10) - 1)
    inputs = randn(*[(2, 333, *row)] * 3, *[(2, tail, *row)] * 2, *[(persistent, *row)] * 2, dtype=torch.float64)
    inputs = [x for x in inputs if x.numel()]
    where = torch.tensor([[*range(4, 104), *PLACES[100:]], PLACES])

    def attend(name):
        def call(q, k, v, *pairs):
            y, _ = sliding_window_attention(
                q, k, v, window=window, tail=pairs[:2] if tail else None, persistent=pairs[-2:] if persistent else None,
                positions=places[q.device.type] if documents else None, backend=name,
            )  # fmt: skip
            return y

        return call

    places = {"cpu": where, device: where.to(device)}
    exact = serves_or_skips(
        WINDOW,
        backend,
        q=inputs[0].to(device).bfloat16(),
        limit=places[device] if documents else None,
        document_multiple=1,
    )
    check(attend(backend), attend("reference"), inputs, device, 1e-2, exact)


@pytest.mark.parametrize("backend", fast(WINDOW))
@pytest.mark.parametrize("documents", [False, True])
def test_window_attention_at_length(backend, documents, device):
    """Blocks, windows and sequences in numbers as in training, against sdpa; documents on a grid of 64."""
    batch, tokens, heads, size, window = 2, 4099, 4, 64, 1024
    row = (heads, size)
    inputs = randn(*[(batch, tokens, *row)] * 3, *[(batch, 200, *row)] * 2, *[(16, *row)] * 2, dtype=torch.bfloat16)
    where = torch.tensor([*range(70, 70 + 960), *range(64), *range(61), *[-1] * 3, *range(tokens)])[:tokens]
    where = where.expand(batch, -1).contiguous().to(device) if documents else None

    def attend(name):
        def call(q, k, v, tk, tv, pk, pv):
            y, _ = sliding_window_attention(
                q,
                k,
                v,
                window=window,
                tail=(tk, tv),
                persistent=(pk, pv),
                positions=where,
                document_multiple=64,
                backend=name,
            )
            return y

        return call

    serves_or_skips(WINDOW, backend, q=inputs[0].to(device), limit=where, document_multiple=64)
    found = results(attend(backend), inputs, device, torch.bfloat16)
    for i, (a, b) in enumerate(zip(found, results(attend("sdpa"), inputs, device, torch.float32), strict=True)):
        assert_equal(a, b, 1e-2, f"tensor {i}")


@pytest.mark.parametrize("backend", fast(WINDOW))
def test_window_attention_is_the_same_twice(backend, device):
    """Under torch.use_deterministic_algorithms, which the kernels' tests have on."""
    row = (4, 64)
    inputs = randn(*[(2, 1000, *row)] * 3, *[(8, *row)] * 2, dtype=torch.bfloat16)
    serves_or_skips(WINDOW, backend, q=inputs[0].to(device), limit=None, document_multiple=1)

    def call(q, k, v, pk, pv):
        return sliding_window_attention(q, k, v, window=100, persistent=(pk, pv), backend=backend)[0]

    torch.use_deterministic_algorithms(True)
    try:
        first, again = (results(call, inputs, device, torch.bfloat16) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", fast(SEGMENT))
def test_segment_attention(backend, device):
    row = (2, 64)
    inputs = randn((2, 70, *row), *[(2, 100, *row)] * 4, *[(3, *row)] * 2, *[(2, 5, *row)] * 2, dtype=torch.float64)

    def attend(name):
        return lambda q, k, v, mk, mv, pk, pv, ck, cv: segment_attention(
            q, k, v, mk, mv, persistent=(pk, pv), context=(ck, cv), backend=name
        )

    exact = serves_or_skips(SEGMENT, backend, q=inputs[0].to(device).bfloat16())
    check(attend(backend), attend("reference"), inputs, device, 1e-2, exact)


@pytest.mark.parametrize("backend", fast(SHORT_CONV))
def test_convolution(backend, device):
    inputs = randn((2, 333, 48), (48, 4), (1, 3, 48), dtype=torch.float64)
    where = torch.arange(333).remainder(100).expand(2, -1)
    places = {"cpu": where, device: where.to(device)}

    def convolve(name):
        return lambda x, w, start: causal_conv(x, w, initial=start, positions=places[x.device.type], backend=name)[0]

    check(convolve(backend), convolve("reference"), inputs, device, 1e-2)


@pytest.mark.parametrize("backend", fast(CROSS_ENTROPY))
def test_cross_entropy(backend, device):
    inputs = randn((500, 64), (300, 64), dtype=torch.float64)
    labels = torch.randint(0, 300, (500,), generator=torch.Generator().manual_seed(1))
    labels[::7] = -100
    places = {"cpu": labels, device: labels.to(device)}

    def loss(name):
        return lambda h, w: linear_cross_entropy(h, w, places[h.device.type], chunk_tokens=64, backend=name)[0] / 400

    check(loss(backend), loss("reference"), inputs, device, 1e-2)
