"""One token, and reading alone, against the oracle."""

import pytest
import torch
from scan_cases import arguments, assert_equal, states, tensors
from scan_compared import doubled, inputs

from titans_pretrain.kernels.memory_scan import MemoryState, memory_read, memory_step

SHAPES = [(2, 32, 64), (1, 32, None)]


@pytest.mark.parametrize("depth, dim, hidden", SHAPES)
@pytest.mark.parametrize("norm, forget_to", [(True, "initial"), (False, "zero")])
def test_steps_equal_reference(depth, dim, hidden, norm, forget_to):
    """Over a chunk's end; one of the states is of batch 1."""
    gates = depth if forget_to == "zero" else 1
    x = inputs(4, depth, batch=2, heads=1, gates=gates, dim=dim, hidden=hidden)
    options = dict(chunk_size=3, residual_norm=norm, damping=0.7 * norm, forget_to=forget_to)
    found = []
    for given, backend in ((x, "triton"), (doubled(x), "reference")):
        state, initial = states(given, depth)
        with torch.no_grad():
            state, ys = MemoryState(*(tuple(t[:1] for t in ts) for ts in (state.weights, state.surprise))), []
            for t in range(4):
                y, state = memory_step(
                    *arguments(given, t, t + 1), state, initial_state=initial, backend=backend, **options
                )
                ys.append(y)
        found.append(tensors(torch.cat(ys, 1), state))
    for i, (p, r) in enumerate(zip(*found, strict=True)):
        assert_equal(p, r, 1e-6, f"output {i}")


@pytest.mark.parametrize("depth, dim, hidden", SHAPES)
@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.parametrize("norm", [True, False])
def test_read_equals_reference(depth, dim, hidden, tokens, norm):
    x = inputs(tokens, depth, batch=2, dim=dim, hidden=hidden)
    _, initial = states(x, depth)
    _, exact = states(doubled(x), depth)
    with torch.no_grad():
        y = memory_read(x["q"], initial, residual_norm=norm, backend="triton")
        expected = memory_read(x["q"].double(), exact, residual_norm=norm, backend="reference")
    assert_equal(y, expected, 1e-6)


def test_a_gradient_is_refused():
    x = inputs(1, 2, dim=16, hidden=16)
    state, initial = states(x, 2)
    with pytest.raises(
        ValueError, match=r"backend=triton cannot serve a gradient: .* use torch.no_grad\(\), or backend=auto"
    ):
        memory_step(*arguments(x), state, chunk_size=16, initial_state=initial, backend="triton")
    with pytest.raises(ValueError, match="a gradient"):
        memory_read(x["q"].detach(), state, backend="triton")
