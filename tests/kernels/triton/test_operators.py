"""The scan as operators: torch's own checks, compilation, and what is saved."""

import pytest
import torch
from scan_cases import arguments, assert_equal, gradients, states, tensors
from scan_compared import inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from titans_pretrain.kernels.memory_scan import memory_read, memory_scan, memory_step
from titans_pretrain.kernels.memory_scan.triton import operators, step

SIZES = dict(batch=1, heads=1, dim=16, hidden=16)
OPTIONS = dict(chunk_size=16, residual_norm=True, forget_to="initial")


def scan(x, start=None, stop=None, **options):
    state, initial = states(x, 2)
    y, state = memory_scan(
        *arguments(x, start, stop), state, initial_state=initial, backend="triton", **OPTIONS, **options
    )
    return tensors(y, state)


def test_opcheck():
    x = inputs(3, 2, **SIZES)
    state, initial = states(x, 2)
    given = [*state.weights, *state.surprise, *initial.weights, *initial.surprise]
    flat = (arguments(x), given, None, 2, 0, 16, True, 0.7, True, None, True)
    torch.library.opcheck(operators.memory_scan, flat)


def test_opcheck_of_step_and_read():
    x = {n: t.detach() for n, t in inputs(1, 2, **SIZES).items()}
    state, initial = states(x, 2)
    torch.library.opcheck(
        step.memory_step, (arguments(x), state.weights, state.surprise, state.weights, initial.weights, True, 0.7)
    )
    torch.library.opcheck(step.memory_read, (x["q"], state.weights, True))


def test_compiles_whole():
    """One graph with its backward pass; step and read too."""
    torch.compiler.reset()
    x = inputs(3, 2, **SIZES)
    expected = scan(x)
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    found = compiled(x)
    for p, r in zip(found, expected, strict=True):
        assert torch.equal(p, r)
    for (name, p), r in zip(gradients(found, x).items(), gradients(expected, x).values(), strict=True):
        assert torch.equal(p, r), name

    @torch.no_grad()
    def decode(x):
        state, initial = states(x, 2)
        y, state = memory_step(*arguments(x, 0, 1), state, initial_state=initial, backend="triton", **OPTIONS)
        return y + memory_read(x["q"][:, :1], state, backend="triton")

    assert torch.equal(torch.compile(decode, fullgraph=True, backend="aot_eager")(x), decode(x))


def test_one_compilation_serves_all_lengths():
    """After the first, which torch takes for the only one: of whole chunks."""
    counted = CompileCounterWithBackend("aot_eager")

    @torch.no_grad()
    def outputs(tokens, state, initial):
        return memory_scan(*tokens, state, initial_state=initial, backend="triton", **OPTIONS)[0]

    compiled = torch.compile(outputs, fullgraph=True, backend=counted)
    for tokens in (16, 32, 48):
        x = inputs(tokens, 1, batch=1, heads=1, dim=16)
        given = arguments(x), *states(x, 1)
        assert torch.equal(compiled(*given), outputs(*given))
    assert counted.frame_count == 2


def test_activation_checkpointing():
    x = inputs(19, 2, **SIZES)
    outputs = checkpoint(scan, x, use_reentrant=False)
    for (name, p), r in zip(gradients(outputs, x).items(), gradients(scan(x), x).values(), strict=True):
        assert torch.equal(p, r), name


def test_a_call_without_gradients_saves_nothing():
    x = inputs(35, 2, **SIZES)
    with torch.no_grad():
        found = scan(x, checkpoint_every=1)
    for p, r in zip(found, scan(x, checkpoint_every=1), strict=True):
        assert torch.equal(p, r) and not p.requires_grad


def test_only_some_gradients():
    """Of the final state alone, where y has none."""
    x = inputs(19, 2, **SIZES)
    _, w1, *_ = scan(x)
    (d,) = torch.autograd.grad(w1.sum(), [x["k"]])
    assert d.isfinite().all() and d.any()
    assert_equal(d, torch.autograd.grad(scan(x)[1].sum(), [x["k"]])[0])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch.compiler.reset()
