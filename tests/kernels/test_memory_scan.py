"""The chunked scan against the token-by-token oracle, float64: outputs, final states and every gradient."""

import itertools

import pytest
import torch
from scan_cases import (
    DIM,
    HEADS,
    TOKENS,
    arguments,
    assert_equal,
    compare,
    gradients,
    make,
    run,
    states,
    tensors,
)
from targets import targets

from titans_pretrain.kernels.memory_scan import MemoryState, memory_read, memory_scan, memory_step
from titans_pretrain.kernels.memory_scan.contract import SCAN

FAST = pytest.mark.parametrize("device, backend", targets(SCAN, oracle=False))
ALL = pytest.mark.parametrize("device, backend", targets(SCAN))


@pytest.mark.parametrize("depth, chunk", [(1, 1), (1, 5), (2, 1), (2, 5), (3, 5)])
@pytest.mark.parametrize("damping", [0.3, 2.0])
@FAST
def test_damped_gradient(depth, chunk, damping, device, backend):
    x = make(13, depth, seed=depth, device=device)
    compare(x, depth, dict(chunk_size=chunk, residual_norm=True, damping=damping, forget_to="initial"), backend)


NORMS = {
    "linear": dict(residual_norm=False),
    "norm": dict(residual_norm=True),
    "damped": dict(residual_norm=True, damping=0.7),
}
OPTIONS = list(itertools.product((1, 2, 3), NORMS, ("zero", "initial"), (False, True), (False, True)))


@pytest.mark.parametrize("depth, norm, forget_to, per_layer, resets", OPTIONS)
@FAST
def test_equals_reference(depth, norm, forget_to, per_layer, resets, device, backend):
    x = make(23, depth, gates=depth if per_layer else 1, seed=depth, device=device)
    reset = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 1, 1]], dtype=torch.bool, device=device) if resets else None
    options = dict(chunk_size=5, forget_to=forget_to, reset=reset, **NORMS[norm])
    compare(x, depth, options, backend, dict(checkpoint_every=2))


@pytest.mark.parametrize(
    "tokens, chunk",
    [(1, 1), (1, 4), (7, 1), (3, 8), (16, 8), (17, 8), (70, 66), (140, 66), (70, 67), (140, 67)],
)
@FAST
def test_lengths_and_chunks(tokens, chunk, device, backend):
    """Single tokens, chunks longer than the sequence, chunks of several tiles, of one length (66 = 2 x 33) or not (67 = 34 + 33)."""
    x = make(tokens, 2, batch=1, seed=tokens, device=device)
    compare(x, 2, dict(chunk_size=chunk, residual_norm=True, forget_to="initial"), backend)


@pytest.mark.parametrize("every", [1, 3, 100])
@FAST
def test_checkpoints_do_not_matter(every, device, backend):
    compare(make(29, 2, device=device), 2, dict(chunk_size=4), backend, dict(checkpoint_every=every))


# A chunk of 201 tokens takes several spans: the oracle would take a minute.
@pytest.mark.parametrize(
    "device, backend, chunk, cuts",
    [
        pytest.param(*where.values, *case, marks=where.marks)
        for where in targets(SCAN)
        for case in [(5, (0, 3, 4, 11, 23)), (40, (0, 3, 21, 23)), (34, (0, 20, 75)), (201, (0, 201, 410))]
        if case[0] < 201 or "reference" not in where.values
    ],
)
@pytest.mark.parametrize("forget_to", ["zero", "initial"])
@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_split_invariance(device, backend, chunk, cuts, forget_to, damping):
    """Any split gives the outputs, the final state and the gradients of one call, through half-read chunks too."""
    x = make(cuts[-1], 2, batch=1, device=device)
    options = dict(chunk_size=chunk, residual_norm=True, damping=damping, forget_to=forget_to, backend=backend)
    state, initial = states(x, 2)
    whole = tensors(*memory_scan(*arguments(x), state, initial_state=initial, **options))
    ys = []
    for start, stop in itertools.pairwise(cuts):
        y, state = memory_scan(*arguments(x, start, stop), state, initial_state=initial, **options)
        ys.append(y)
    parts = tensors(torch.cat(ys, 1), state)
    for p, r in zip(parts, whole, strict=True):
        assert_equal(p, r)
    for (name, p), r in zip(gradients(parts, x).items(), gradients(whole, x).values(), strict=True):
        assert_equal(p, r, name=name)


@pytest.mark.parametrize("depth, norm, forget_to", list(itertools.product((1, 2, 3), NORMS, ("zero", "initial"))))
@ALL
def test_steps_equal_scan(depth, norm, forget_to, device, backend):
    x = make(11, depth, device=device)
    options = dict(chunk_size=4, forget_to=forget_to, **NORMS[norm])
    expected = tensors(*run(x, depth, "reference", **options))
    state, initial = states(x, depth)
    ys = []
    for t in range(11):
        step, state = memory_step(*arguments(x, t, t + 1), state, initial_state=initial, backend=backend, **options)
        ys.append(step)
    found = tensors(torch.cat(ys, 1), state)
    for p, r in zip(found, expected, strict=True):
        assert_equal(p, r)
    for (name, p), r in zip(gradients(found, x).items(), gradients(expected, x).values(), strict=True):
        assert_equal(p, r, name=name)


def test_reset_starts_afresh():
    """After a reset the second document is what it is alone, and takes nothing from the first."""
    x = make(20, 2, batch=1)
    state, initial = states(x, 2)
    reset = torch.tensor([[False, False, True, False]])
    y, final = memory_scan(*arguments(x), state, chunk_size=5, reset=reset, initial_state=initial)
    alone, last = memory_scan(*arguments(x, 10), initial, chunk_size=5)
    assert torch.equal(y[:, 10:], alone)
    assert all(torch.equal(a, b) for a, b in zip(final.weights, last.weights, strict=True))


def test_inert_tokens_leave_the_weights():
    x = make(9, 2)
    zeros = torch.zeros_like(x["lr"])
    state, _ = states(x, 2)
    _, new = memory_scan(*arguments(x)[:3], zeros, zeros, zeros, state, chunk_size=4)
    for a, b in zip(new.weights, state.weights, strict=True):
        assert torch.equal(a, b)
    assert all(not s.any() for s in new.surprise)


@ALL
def test_read_has_no_effect(device, backend):
    x = make(5, 2, device=device)
    state, _ = states(x, 2)
    y = memory_read(x["q"], state, residual_norm=True, backend=backend)
    zeros = torch.zeros_like(x["lr"])
    again, _ = memory_scan(*arguments(x)[:3], zeros, zeros, zeros, state, chunk_size=2, residual_norm=True)
    assert_equal(y, again)


def test_chunk_one_is_the_papers_recurrence():
    """C = 1, linear memory, written out: W_t = (1-a) W + eta S - theta 2 k^T (k W - v)."""
    x = make(12, 1, batch=1)
    state, _ = states(x, 1)
    y, final = memory_scan(*arguments(x), state, chunk_size=1)
    w, s = state.weights[0], state.surprise[0]
    for t in range(12):
        q, k, v = (x[n][:, t].unsqueeze(-2) for n in ("q", "k", "v"))
        alpha, eta, theta = (x[n][:, t].unsqueeze(-1) for n in ("forget", "momentum", "lr"))
        s = eta * s - theta * 2 * k.mT @ (k @ w - v)
        w = (1 - alpha) * w + s
        assert_equal(y[:, t], (q @ w).squeeze(-2))
    assert_equal(final.weights[0], w)


def test_causal_and_independent():
    """Changing a token leaves earlier outputs, and other samples, bit-identical."""
    x = make(37, 2)
    options = dict(chunk_size=8, residual_norm=True, forget_to="initial")
    y, _ = run(x, 2, **options)
    changed = {n: t.detach().clone() for n, t in x.items()}
    for name in ("q", "k", "v"):
        changed[name][0, 21] += 1
    changed["lr"][0, 21] = 0.05
    z, _ = run(changed, 2, **options)
    assert torch.equal(y[0, :21], z[0, :21]) and torch.equal(y[1], z[1])
    assert not torch.equal(y[0, 21:], z[0, 21:])


@pytest.mark.parametrize("regime", ["mild", "saturated", "exact"])
@FAST
def test_float32(regime, device, backend):
    """float32 against the float64 oracle, saturated gates included: 1e-5 relative, the gates' gradients too.

    The steps are small: with those of the other tests the oracle itself is off by 3e-5 in float32."""
    x = make(200, 2, batch=1, device=device)
    with torch.no_grad():
        x["lr"].mul_(0.2)
        if regime == "mild":
            x["forget"].mul_(0.05)
        elif regime == "saturated":
            x["forget"].mul_(0.01).add_(0.99)
            x["momentum"].mul_(0.01)
        else:
            x["forget"].fill_(1.0)
            x["momentum"].fill_(0.0)
    options = dict(chunk_size=40, residual_norm=True, forget_to="initial")
    single = {n: t.detach().float().requires_grad_() for n, t in x.items()}
    a, b = tensors(*run(single, 2, backend, **options)), tensors(*run(x, 2, "reference", **options))
    for p, r in zip(a, b, strict=True):
        assert_equal(p.double(), r, 1e-5)
    for (name, p), r in zip(gradients(a, single).items(), gradients(b, x).values(), strict=True):
        assert_equal(p.double(), r, 1e-5, name)


@ALL
def test_bfloat16_inputs_keep_a_float32_state(device, backend):
    """Nothing is computed in bfloat16: rounded inputs give what they give in float32, under autocast too, but for y's rounding."""
    x = make(16, 2, dtype=torch.float32, device=device)
    low = {n: t.detach().bfloat16().requires_grad_() if n in TOKENS else t for n, t in x.items()}
    high = {n: t.detach().float().requires_grad_() for n, t in low.items()}
    options = dict(chunk_size=4, residual_norm=True, damping=0.7)
    with torch.autocast(device, torch.bfloat16):
        y, new = run(low, 2, backend, **options)
        read = memory_read(high["q"], new, residual_norm=True, backend=backend)
        first = [t[:, :1] for t in arguments(low)]
        _, stepped = memory_step(*first, states(low, 2)[0], backend=backend, **options)
    expected, same = run(high, 2, backend, **options)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected.bfloat16())
    for a, b in zip((*new.weights, *new.surprise), (*same.weights, *same.surprise), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    assert torch.equal(read, memory_read(high["q"], same, residual_norm=True, backend=backend))
    _, single = memory_step(*(t[:, :1] for t in arguments(high)), states(high, 2)[0], backend=backend, **options)
    assert all(torch.equal(a, b) for a, b in zip(stepped.weights, single.weights, strict=True))
    for (n, d), wanted in zip(gradients([y], low).items(), gradients([expected], high).values(), strict=True):
        assert_equal(d, wanted, 5e-3, n)  # y's gradient is rounded on its way in


@pytest.mark.parametrize("forget_to", ["zero", "initial"])
@ALL
def test_a_half_read_state_of_batch_one_serves_every_row(forget_to, device, backend):
    """Its anchor too is expanded, and its gradients are summed over the rows."""
    x = make(9, 2, batch=3, device=device)
    options = dict(chunk_size=5, residual_norm=True, damping=0.7, forget_to=forget_to, backend=backend)
    alone = {n: (t[:1] if n.startswith(("weight", "surprise")) else t) for n, t in x.items()}
    found, steps = [], []
    for rows in (1, 3):
        state, initial = states(alone, 2)
        _, half = memory_scan(*(t[:1, :3] for t in arguments(x)), state, initial_state=initial, **options)
        assert half.offset == 3 and half.batch == 1
        parts = (tuple(w.repeat(rows, 1, 1, 1) for w in ws) for ws in (half.weights, half.surprise, half.anchor))
        expanded, half = half.expand(rows), MemoryState(*parts, half.offset)
        assert expanded.offset == half.offset
        assert all(torch.equal(a, b) for a, b in zip(tensors(x["q"], expanded), tensors(x["q"], half), strict=True))
        with torch.no_grad():
            steps.append(tensors(*memory_step(*arguments(x, 0, 1), half, initial_state=initial, **options)))
        outputs = tensors(*memory_scan(*arguments(x), half, initial_state=initial, **options))
        found.append([*outputs, *gradients(outputs, x).values(), *steps[-1]])
    for i, (p, r) in enumerate(zip(*found, strict=True)):
        assert_equal(p, r, name=str(i))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.zeros(2, 0, HEADS, DIM)), "T=0"),
        (dict(k=torch.zeros(2, 9, HEADS, DIM + 1)), "k is"),
        (dict(v=torch.zeros(2, 9, HEADS, DIM, dtype=torch.int64)), "v is"),
        (dict(lr=torch.zeros(2, 9, HEADS, 5)), "lr is"),
        (dict(chunk_size=0), "chunk_size"),
        (dict(forget_to="nowhere"), "forget_to"),
        (dict(backend="fast"), "backend"),
        (dict(forget_to="initial", initial_state=None), "initial_state"),
        (dict(damping=-0.1), "damping must be 0 or more and finite, got -0.1"),
        (dict(damping=float("inf")), "damping"),
        (dict(reset=torch.zeros(2, 2, dtype=torch.bool)), "reset must be"),
        (dict(forget=torch.zeros(2, 9, HEADS, 1, dtype=torch.int64)), "forget must be a floating"),
    ],
)
def test_bad_input(change, message):
    x = make(9, 2)
    state, initial = states(x, 2)
    tokens = [change.get(n, x[n]) for n in TOKENS]
    options = dict(chunk_size=4, initial_state=initial) | {n: c for n, c in change.items() if n not in TOKENS}
    with pytest.raises(ValueError, match=message):
        memory_scan(*tokens, state, **options)


@pytest.mark.parametrize(
    "gate, value, message",
    [
        ("forget", -1e-3, r"forget must be in \[0, 1\], got values from -0.001 to"),
        ("forget", 1.001, r"forget must be in \[0, 1\], got values from .* to 1.001"),
        ("momentum", 1.001, r"momentum must be in \[0, 1\]"),
        ("lr", -1e-3, "lr must be 0 or more and finite, got values from -0.001"),
        ("lr", float("inf"), "lr must be 0 or more and finite"),
    ],
)
def test_a_gate_out_of_range_is_named(gate, value, message):
    x = {n: t.detach().clone() for n, t in make(9, 2).items()}
    state, _ = states(x, 2)
    x[gate][1, 4, 0] = value
    with pytest.raises(ValueError, match=message):
        memory_scan(*arguments(x), state, chunk_size=4)
    with pytest.raises(ValueError, match=message):
        memory_step(*arguments(x, 4, 5), state, chunk_size=4)


def test_a_diverged_model_is_not_told_about_its_gates():
    """NaN passes through to the loss: whoever trains stops there, and says what to try."""
    x = {n: t.detach() for n, t in make(9, 2).items()}
    state, _ = states(x, 2)
    x["forget"][1, 4, 0] = float("nan")
    y, _ = memory_scan(*arguments(x), state, chunk_size=4)
    assert y[1].isnan().any() and y[0].isfinite().all()


@ALL
def test_the_ends_of_the_gates_ranges_are_legal(device, backend):
    x = make(9, 2, device=device)
    state, _ = states(x, 2)
    one = torch.ones_like(x["forget"])
    y, new = memory_scan(x["q"], x["k"], x["v"], one, one, 0 * one, state, chunk_size=4, backend=backend)
    assert y.isfinite().all()
    for w, s in zip(new.weights, state.surprise, strict=True):  # all forgotten, the surprise kept
        assert torch.equal(w, s)


def test_bad_state():
    x = make(9, 2)
    state, initial = states(x, 2)
    single = tuple(w.float() for w in state.weights)
    for bad in (
        MemoryState(tuple(w.half() for w in state.weights), tuple(s.half() for s in state.surprise)),
        MemoryState(single, state.surprise),
        MemoryState((single[0], state.weights[1]), (state.surprise[0].float(), state.surprise[1])),
        MemoryState(state.weights, state.surprise, single, 2),
    ):
        for call in (
            lambda bad=bad: memory_scan(*arguments(x), bad, chunk_size=4),
            lambda bad=bad: memory_step(*arguments(x, 0, 1), bad, chunk_size=4),
            lambda bad=bad: memory_read(x["q"], bad),
        ):
            with pytest.raises(
                ValueError, match=r"state: the .* of memory layer \d are .*; all states are of one dtype, float32"
            ):
                call()
    other = MemoryState(single, tuple(s.float() for s in state.surprise))
    with pytest.raises(ValueError, match="initial_state: the weights of memory layer 0 are torch.float64"):
        memory_scan(*arguments(x), other, chunk_size=4, initial_state=initial)
    with pytest.raises(ValueError, match="anchor"):
        memory_scan(*arguments(x), MemoryState(state.weights, state.surprise, state.weights[::-1], 2), chunk_size=4)
    _, half = memory_scan(*arguments(x), state, chunk_size=4)
    with pytest.raises(ValueError, match="half-read"):
        memory_scan(*arguments(x), half, chunk_size=4, initial_state=initial, reset=torch.ones(2, 3, dtype=torch.bool))
    assert half.offset == 1 and initial.expand(2).expand(2).batch == 2
    with pytest.raises(ValueError, match="batch"):
        state.expand(3)


@pytest.mark.parametrize("forget_to", ["zero", "initial"])
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_rows_at_offsets_of_their_own_step_as_each_alone(chunk_size, forget_to):
    depth, starts, steps = 2, (0, 3, 6), 6
    x = make(max(starts) + steps, depth, batch=3, gates=depth)
    state, initial = states(x, depth)
    options = dict(chunk_size=chunk_size, residual_norm=True, damping=1.0, forget_to=forget_to, initial_state=initial)
    ys, at = [], []  # row by row with the oracle: what it reads, and where it stands after `start` tokens
    for row, start in enumerate(starts):

        def of_row(s, row=row):
            return MemoryState(tuple(w[row : row + 1] for w in s.weights), tuple(w[row : row + 1] for w in s.surprise))

        own = [t[row : row + 1] for t in arguments(x)]
        before = of_row(state)
        if start:
            _, before = memory_scan(*(t[:, :start] for t in own), before, backend="reference", **options)
        y, _ = memory_scan(*(t[:, start : start + steps] for t in own), before, backend="reference", **options)
        ys.append(y)
        at.append(before)
    weights, surprise, anchor = (
        tuple(map(torch.cat, zip(*parts)))
        for parts in ([s.weights for s in at], [s.surprise for s in at], [s.anchor or s.weights for s in at])
    )
    ragged = MemoryState(weights, surprise, anchor, torch.tensor([s.offset for s in at]))
    found = []
    for t in range(steps):
        tokens = [torch.stack([g[row, s + t : s + t + 1] for row, s in enumerate(starts)]) for g in arguments(x)]
        y, ragged = memory_step(*tokens, ragged, **options)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(ys), rtol=1e-10, atol=1e-10)
    assert ragged.offset.tolist() == [(start + steps) % chunk_size for start in starts]
    with pytest.raises(ValueError, match="stand at offsets of their own; memory_step reads on"):
        memory_scan(*tokens, ragged, **options)
    with pytest.raises(
        ValueError, match="backend=reference cannot serve state: its rows stand at offsets of their own"
    ):
        memory_step(*tokens, ragged, backend="reference", **options)
    wrong = MemoryState(weights, surprise, anchor, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"offset is \(1,\); it must be one for each of the 3 rows"):
        memory_step(*tokens, wrong, **options)
