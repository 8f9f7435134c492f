"""Where kernels like these have failed others: many programs, large buffers, gates at their ends, memory behind a tensor, runs that
differ. On CUDA at full size; interpreted, the same on a few programs."""

import pytest
import torch
from scan_cases import arguments, assert_equal, states, tensors
from scan_compared import DEVICE, compare, inputs

from titans_pretrain.kernels.memory_scan import MemoryState, memory_scan

ON_CUDA = DEVICE == "cuda"
BRAIN = torch.bfloat16
SIZES = dict(dim=16, hidden=16)
OPTIONS = dict(chunk_size=16, residual_norm=True, damping=0.7, forget_to="initial")


def results(x, depth=2, **options):
    state, initial = states(x, depth)
    y, state = memory_scan(*arguments(x), state, initial_state=initial, backend="triton", **OPTIONS | options)
    outputs = tensors(y, state)
    weight = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float32).view_as(y)
    return [*outputs, *torch.autograd.grad((y.float() * weight).sum(), [t for n, t in x.items() if "init" not in n])]


def test_more_heads_than_a_grid_has_rows():
    """65,535 is the most that a grid's second and third axes take. All heads the same: each is the first to the bit."""
    heads = 70_000 if ON_CUDA else 2
    one = inputs(17, 2, batch=1, heads=1, dtype=BRAIN, **SIZES)
    x = {n: t.detach().repeat_interleave(heads, 2 if t.shape[1] == 17 else 1).requires_grad_() for n, t in one.items()}
    state, initial = states(x, 2)
    y, state = memory_scan(*arguments(x), state, initial_state=initial, backend="triton", **OPTIONS)
    d_q, d_w = torch.autograd.grad(y.float().square().sum(), [x["q"], x["weight0"]])
    for found, axis in ((y, 2), (state.weights[1], 1), (d_q, 2), (d_w, 1)):
        assert found.isfinite().all()
        assert torch.equal(found, found.narrow(axis, 0, 1).expand_as(found))


@pytest.mark.parametrize("backward", [False, True])
def test_buffers_beyond_two_to_the_31_elements(backward):
    """Tokens of nothing but zeros leave the state as it was; those after them are as a call of their own."""
    heads, dim, chunk, tail = (512, 64, 64, 192) if ON_CUDA else (1, 16, 16, 17)
    before = (-(-(2**31) // (heads * dim)) // chunk + 1) * chunk if ON_CUDA else chunk
    if ON_CUDA:
        needed = (before + tail) * heads * dim * (36 if backward else 14)
        if torch.cuda.mem_get_info()[0] < needed:
            pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
        assert (before + tail) * heads * dim > 2**31
    torch.use_deterministic_algorithms(False)  # no poison into such buffers
    short = {n: t.detach() for n, t in inputs(tail, 1, batch=1, heads=heads, dim=dim, dtype=BRAIN).items()}
    state, initial = states(short, 1)
    calls = []
    for leading in (before, 0):
        x = []
        for t in arguments(short):
            x.append(torch.zeros(1, leading + tail, *t.shape[2:], dtype=t.dtype, device=DEVICE))
            x[-1][:, leading:] = t
            x[-1].requires_grad_(backward)
        y, after = memory_scan(
            *x, MemoryState(state.weights, tuple(torch.zeros_like(s) for s in state.surprise)), initial_state=initial,
            backend="triton", **OPTIONS | dict(chunk_size=chunk),
        )  # fmt: skip
        calls.append([y[:, leading:].detach(), after.weights[0].detach()])
        if backward:
            weight = torch.zeros_like(y)
            weight[:, leading:] = 1
            calls[-1] += [d[:, leading:].clone() for d in torch.autograd.grad(y, x, weight)]
        del x, y, after
    for i, (found, alone) in enumerate(zip(*calls, strict=True)):
        assert torch.equal(found, alone), i


@pytest.mark.parametrize("alpha, eta, seed", [(0.0, 0.0, 2), (1e-12, 1.0, 0), (1.0, 0.0, 0), (1.0, 1.0, 0)])
def test_gates_at_their_ends_in_bfloat16(alpha, eta, seed):
    """1e-12: nothing beside 1, and no logarithm is taken of it. Where eta = 0 the first token's number is nearly all of a gate's gradient,
    and with these seeds its terms cancel."""
    x = inputs(19, 2, batch=1, heads=1, dtype=BRAIN, seed=seed, **SIZES)
    with torch.no_grad():
        x["forget"].fill_(alpha)
        x["momentum"].fill_(eta)
        x["lr"].mul_(0.1)
    compare(x, 2, conditioned=True, **OPTIONS)


def test_nothing_is_read_behind_or_before_a_tensor():
    """One token more than a chunk, each tensor in the middle of a block of NaN."""
    clean = inputs(17, 2, batch=1, heads=1, dtype=BRAIN, **SIZES)
    guarded = {}
    for name, t in clean.items():
        block = torch.full((2 * 4096 + t.numel(),), float("nan"), dtype=t.dtype, device=DEVICE)
        guarded[name] = block[4096 : 4096 + t.numel()].view_as(t).copy_(t.detach()).requires_grad_()
        assert guarded[name].is_contiguous()
    for i, (found, wanted) in enumerate(zip(results(guarded), results(clean), strict=True)):
        assert torch.equal(found, wanted), i


@pytest.mark.parametrize("depth", [1, 2])
def test_runs_are_equal_to_the_bit(depth):
    tokens, heads, dim, chunk = (1000, 8, 64, 64) if ON_CUDA else (17, 1, 16, 16)
    x = inputs(tokens, depth, batch=1, heads=heads, dim=dim, hidden=dim * (4 if ON_CUDA else 1), dtype=BRAIN)
    first = results(x, depth, chunk_size=chunk)
    for _ in range(20 if ON_CUDA else 1):
        assert all(torch.equal(a, b) for a, b in zip(results(x, depth, chunk_size=chunk), first, strict=True))


@pytest.mark.skipif(not ON_CUDA, reason="of CUDA: equal tokens and noise at length are in the layer's tests on a CPU")
@pytest.mark.parametrize("tokens, equal", [(4096, True), (16384, False)])
def test_long_inputs_stay_bounded(tokens, equal):
    x = inputs(tokens, 2, batch=1, heads=2, dim=64, hidden=256, dtype=BRAIN, forget=0.02)
    if equal:
        for name in ("q", "k", "v"):
            x[name] = x[name].detach()[:, :1].expand_as(x[name]).contiguous().requires_grad_()
    with torch.no_grad():
        x["lr"].mul_(1 / 64)
    exact = {n: t.detach().requires_grad_() for n, t in x.items()}
    found = results(x, chunk_size=64)
    state, initial = states(exact, 2)
    y, after = memory_scan(
        *arguments(exact), state, initial_state=initial, backend="chunked", **OPTIONS | dict(chunk_size=64)
    )
    for i, (a, b) in enumerate(zip(found, tensors(y, after), strict=False)):
        assert_equal(a, b, 3e-2, f"output {i}")
    assert all(t.isfinite().all() for t in found)


@pytest.mark.skipif(not ON_CUDA, reason="of CUDA: the interpreter compiles nothing")
def test_one_compilation_of_the_kernels_serves_all_lengths():
    """Two: calls of whole chunks, and calls that end in one."""
    from triton import knobs

    compiled = []
    released = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **about: compiled.append(about["repr"])
    try:
        for tokens in (64, 50, 128, 192, 1000, 17, 2048):
            results(inputs(tokens, 2, batch=1, heads=2, dim=64, hidden=256, dtype=BRAIN), chunk_size=64)
            if tokens == 128:  # whole chunks, half ones, and what a call of several has
                compiled.clear()
    finally:
        knobs.runtime.jit_post_compile_hook = released
    assert not compiled


@pytest.mark.skipif(not ON_CUDA, reason="of CUDA: the interpreter has no graphs")
def test_a_graph_of_it_is_the_call():
    """Nothing in a call waits or asks for a value: all of it, backward pass too, can be captured and run on other numbers."""
    shape = dict(batch=2, heads=4, dim=64, hidden=256, dtype=BRAIN)
    x, other = inputs(200, 2, **shape, seed=0), inputs(200, 2, **shape, seed=1)
    call = dict(chunk_size=64)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles
        results(x, **call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(x, **call)
    with torch.no_grad():
        for name, t in x.items():
            t.copy_(other[name])
    graph.replay()
    for i, (a, b) in enumerate(zip(captured, results(other, **call), strict=True)):
        assert torch.equal(a, b), i


@pytest.mark.skipif(not ON_CUDA, reason="of CUDA: the interpreter assembles nothing")
def test_assemblers_agree(tmp_path):
    """Each ptxas that is here, to the bit."""
    from benchmarks.gpu import proof
    from benchmarks.gpu.harness import Session
    from titans_pretrain.commands.machine import this_machine

    session = Session(tmp_path / "points", torch.device("cuda"), float("inf"))
    found = {path: proof.probe(session, path)["digest"] for path in proof.assemblers(this_machine())}
    if len(found) < 2:
        pytest.skip("one ptxas here; pip install 'nvidia-cuda-nvcc>=13.3' for another")
    assert len(set(found.values())) == 1, found
