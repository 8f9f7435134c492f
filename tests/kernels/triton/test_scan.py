"""The scan in kernels against the oracle: outputs, final states and every gradient."""

import pytest
import torch
from scan_compared import DEVICE, TOLERANCE, compare, inputs

NORMS = {
    "linear": dict(residual_norm=False),
    "norm": dict(residual_norm=True),
    "damped": dict(residual_norm=True, damping=0.7),
}
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
# Any two values of two columns stand together in some row, where a call can have both; the last two rows are by the way.
# Sizes: (D, F), one slice of F or more. every: chunks of a group.
CASES = [
    # depth, sizes, chunk, tokens, norm, forget_to, gates, resets, dtype, every
    (2, (16, 32), 16, 37, "linear", "zero", 2, True, SINGLE, 1),
    (2, (16, 32), 16, 21, "norm", "initial", 2, False, HALF, None),
    (2, (16, 32), 16, 21, "damped", "zero", 1, False, BRAIN, 1),
    (2, (16, 16), 32, 41, "damped", "initial", 2, True, HALF, None),
    (2, (16, 32), 32, 41, "norm", "initial", 2, False, SINGLE, 1),
    (2, (16, 32), 128, 75, "norm", "zero", 2, True, BRAIN, 1),
    (2, (16, 32), 128, 75, "linear", "zero", 1, False, HALF, None),
    (1, (16, 16), 16, 21, "linear", "initial", 1, False, SINGLE, None),
    (1, (32, 32), 32, 41, "damped", "zero", 1, False, HALF, 1),
    (1, (16, 16), 32, 41, "linear", "initial", 1, False, BRAIN, None),
    (1, (16, 16), 128, 75, "norm", "initial", 1, False, BRAIN, None),
    (1, (16, 16), 128, 75, "damped", "zero", 1, True, SINGLE, 1),
    (2, (16, 64), 64, 19, "damped", "zero", 1, False, BRAIN, 1),
    (2, (16, 16), 16, 1, "linear", "zero", 2, False, SINGLE, None),
]


@pytest.mark.parametrize(
    "depth, sizes, chunk, tokens, norm, forget_to, gates, resets, dtype, every",
    [case if i % 2 else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(CASES)],
)
def test_equals_reference(depth, sizes, chunk, tokens, norm, forget_to, gates, resets, dtype, every):
    batch, heads = (2, 1) if resets else (1, 2)
    dim, hidden = sizes
    forget = 0.5 if chunk < 128 else 0.1  # a chunk's gradients are taken at its start
    shape = dict(batch=batch, heads=heads, gates=gates, dim=dim, hidden=hidden)
    x = inputs(tokens, depth, dtype=dtype, forget=forget, seed=tokens, **shape)
    reset = None
    if resets:
        reset = torch.zeros(batch, -(-tokens // chunk), dtype=torch.bool, device=DEVICE)
        reset[0, -1] = reset[1, 0] = True
    options = dict(chunk_size=chunk, forget_to=forget_to, reset=reset, **NORMS[norm])
    compare(x, depth, only=dict(checkpoint_every=every), **options)


@pytest.mark.parametrize(
    "depth, chunk, cuts, tokens, forget_to, dtype",
    [
        # within a tile; over a chunk's end
        pytest.param(2, 32, (5, 9, 40), 45, "initial", SINGLE, marks=pytest.mark.slow),
        (2, 128, (70, 80), 90, "zero", BRAIN),  # within a chunk's second tile
        (1, 128, (64, 128), 140, "initial", SINGLE),  # at a tile's start, at a chunk's
        (2, 16, (16, 17), 20, "zero", SINGLE),
    ],
)
def test_any_split_is_one_call(depth, chunk, cuts, tokens, forget_to, dtype):
    """Through half-read chunks at both ends of a call, and the gradient of their anchors."""
    x = inputs(tokens, depth, dtype=dtype, batch=1, heads=1, dim=16, hidden=16, seed=chunk)
    compare(x, depth, cuts, chunk_size=chunk, residual_norm=True, damping=0.7, forget_to=forget_to)


@pytest.mark.parametrize(
    "alpha, eta, forget_to", [(1.0, 0.0, "initial"), (0.999, 0.001, "initial"), (0.0, 1.0, "zero")]
)
def test_the_ends_of_the_gates_ranges(alpha, eta, forget_to):
    x = inputs(19, 2, batch=1, heads=1, dim=16, hidden=16)
    with torch.no_grad():
        x["forget"].fill_(alpha)
        x["momentum"].fill_(eta)
        x["lr"].mul_(0.2)
    compare(x, 2, chunk_size=16, residual_norm=True, forget_to=forget_to)


def test_operands_of_mixed_dtypes():
    """As under autocast: q and k in float32, v in bfloat16, which is the products' dtype."""
    x = inputs(20, 2, batch=1, heads=1, dim=16, hidden=16, dtype=BRAIN)
    for name in ("q", "k"):
        x[name] = x[name].detach().float().requires_grad_()
    compare(x, 2, tolerance=TOLERANCE[BRAIN], chunk_size=16, residual_norm=True, forget_to="initial")
