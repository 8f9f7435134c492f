"""The chunked scan against the token-by-token oracle, float64: outputs, final states and every gradient."""

import itertools

import pytest
import torch

from titans_pretrain.kernels.memory_scan import MemoryState, memory_read, memory_scan, memory_step

TOL = 1e-10
HEADS, DIM, HIDDEN = 2, 6, 10


def widths(depth):
    return [DIM, *[HIDDEN + i for i in range(depth - 1)], DIM]


def make(tokens, depth, *, batch=2, gates=1, seed=0, dtype=torch.float64):
    """Inputs with gates that contain exact 0 and 1; all require gradients."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def gate(high):
        x = torch.rand(batch, tokens, HEADS, gates, generator=g, dtype=torch.float64) * high
        kind = torch.randint(0, 8, x.shape, generator=g)
        return torch.where(kind == 0, torch.zeros_like(x), torch.where(kind == 1, torch.full_like(x, high), x))

    x = {
        "q": randn(batch, tokens, HEADS, DIM),
        "k": torch.nn.functional.normalize(randn(batch, tokens, HEADS, DIM), dim=-1),
        "v": randn(batch, tokens, HEADS, DIM),
        "forget": gate(1.0),
        "momentum": gate(1.0),
        "lr": gate(0.1),
    }
    w = widths(depth)
    for i in range(depth):
        x[f"weight{i}"] = randn(batch, HEADS, w[i], w[i + 1]) / w[i] ** 0.5
        x[f"surprise{i}"] = 0.1 * randn(batch, HEADS, w[i], w[i + 1])
        x[f"init{i}"] = randn(1, HEADS, w[i], w[i + 1]) / w[i] ** 0.5
        x[f"init_surprise{i}"] = 0.1 * randn(1, HEADS, w[i], w[i + 1])
    return {name: t.to(dtype).requires_grad_() for name, t in x.items()}


def states(x, depth):
    def pick(name):
        return tuple(x[f"{name}{i}"] for i in range(depth))

    return MemoryState(pick("weight"), pick("surprise")), MemoryState(pick("init"), pick("init_surprise"))


def arguments(x, start=0, stop=None):
    return [x[n][:, start:stop] for n in ("q", "k", "v", "forget", "momentum", "lr")]


def run(x, depth, backend, **options):
    state, initial = states(x, depth)
    return memory_scan(*arguments(x), state, initial_state=initial, backend=backend, **options)


def tensors(y, state):
    return [y, *state.weights, *state.surprise, *(state.anchor or ())]


def gradients(outputs, x, seed=1):
    """Gradients of a random linear functional of all outputs with respect to all inputs."""
    g = torch.Generator().manual_seed(seed)
    total = sum((o * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)
    grads = torch.autograd.grad(total, list(x.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if d is None else d for (n, t), d in zip(x.items(), grads, strict=True)}


def assert_equal(actual, expected, tol=TOL, name=""):
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-3)
    assert error < tol, f"{name}: relative error {error:.2e}"


def compare(x, depth, options, chunked=None, tol=TOL):
    a = tensors(*run(x, depth, "chunked", **options, **(chunked or {})))
    b = tensors(*run(x, depth, "reference", **options))
    assert len(a) == len(b)
    for i, (p, r) in enumerate(zip(a, b, strict=True)):
        assert_equal(p, r, tol, f"output {i}")
    for (name, p), r in zip(gradients(a, x).items(), gradients(b, x).values(), strict=True):
        assert_equal(p, r, tol, f"gradient of {name}")


@pytest.mark.parametrize("depth, chunk", [(1, 1), (1, 5), (2, 1), (2, 5), (3, 5)])
@pytest.mark.parametrize("damping", [0.3, 2.0])
def test_damped_gradient(depth, chunk, damping):
    x = make(13, depth, seed=depth)
    compare(x, depth, dict(chunk_size=chunk, residual_norm=True, damping=damping, forget_to="initial"))


OPTIONS = list(itertools.product((1, 2, 3), (False, True), ("zero", "initial"), (False, True), (False, True)))


@pytest.mark.parametrize("depth, residual_norm, forget_to, per_layer, resets", OPTIONS)
def test_chunked_equals_reference(depth, residual_norm, forget_to, per_layer, resets):
    x = make(23, depth, gates=depth if per_layer else 1, seed=depth)
    reset = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 1, 1]], dtype=torch.bool) if resets else None
    options = dict(chunk_size=5, residual_norm=residual_norm, forget_to=forget_to, reset=reset)
    compare(x, depth, options, dict(checkpoint_every=2))


@pytest.mark.parametrize(
    "tokens, chunk", [(1, 1), (1, 4), (7, 1), (3, 8), (16, 8), (17, 8), (70, 66), (140, 66), (70, 67), (140, 67)]
)
def test_lengths_and_chunks(tokens, chunk):
    """Single tokens, chunks longer than the sequence, chunks of several tiles, of one length (66 = 2 x 33) or not (67 = 34 + 33)."""
    compare(make(tokens, 2, batch=1, seed=tokens), 2, dict(chunk_size=chunk, residual_norm=True, forget_to="initial"))


@pytest.mark.parametrize("every", [1, 3, 100])
def test_checkpoints_do_not_matter(every):
    compare(make(29, 2), 2, dict(chunk_size=4), dict(checkpoint_every=every))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("chunk, cuts", [(5, (0, 3, 4, 11, 23)), (40, (0, 3, 21, 23)), (34, (0, 20, 75))])
@pytest.mark.parametrize("forget_to", ["zero", "initial"])
def test_split_invariance(backend, chunk, cuts, forget_to):
    """Any split gives the outputs, the final state and the gradients of one call, through half-read chunks too."""
    x = make(cuts[-1], 2, batch=1)
    options = dict(chunk_size=chunk, residual_norm=True, forget_to=forget_to, backend=backend)
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


@pytest.mark.parametrize(
    "depth, residual_norm, forget_to", list(itertools.product((1, 2, 3), (False, True), ("zero", "initial")))
)
def test_steps_equal_scan(depth, residual_norm, forget_to):
    x = make(11, depth)
    options = dict(chunk_size=4, residual_norm=residual_norm, damping=residual_norm * 0.7, forget_to=forget_to)
    y, final = run(x, depth, "chunked", **options)
    state, initial = states(x, depth)
    ys = []
    for t in range(11):
        step, state = memory_step(*arguments(x, t, t + 1), state, initial_state=initial, **options)
        ys.append(step)
    for p, r in zip(tensors(torch.cat(ys, 1), state), tensors(y, final), strict=True):
        assert_equal(p, r)


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


def test_read_has_no_effect():
    x = make(5, 2)
    state, _ = states(x, 2)
    y = memory_read(x["q"], state, residual_norm=True)
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
    y, _ = run(x, 2, "chunked", **options)
    changed = {n: t.detach().clone() for n, t in x.items()}
    for name in ("q", "k", "v"):
        changed[name][0, 21] += 1
    changed["lr"][0, 21] = 0.05
    z, _ = run(changed, 2, "chunked", **options)
    assert torch.equal(y[0, :21], z[0, :21]) and torch.equal(y[1], z[1])
    assert not torch.equal(y[0, 21:], z[0, 21:])


@pytest.mark.parametrize("regime", ["mild", "saturated", "exact"])
def test_float32(regime):
    """float32 against the float64 oracle, saturated gates included: 1e-5 relative, the gates' gradients too.

    The steps are small: with those of the other tests the oracle itself is off by 3e-5 in float32."""
    x = make(200, 2, batch=1)
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
    a, b = tensors(*run(single, 2, "chunked", **options)), tensors(*run(x, 2, "reference", **options))
    for p, r in zip(a, b, strict=True):
        assert_equal(p.double(), r, 1e-5)
    for (name, p), r in zip(gradients(a, single).items(), gradients(b, x).values(), strict=True):
        assert_equal(p.double(), r, 1e-5, name)


def test_bfloat16_inputs_keep_a_float32_state():
    x = make(16, 2, dtype=torch.float32)
    state, _ = states(x, 2)
    y, new = memory_scan(*(t.bfloat16() for t in arguments(x)), state, chunk_size=4)
    assert y.dtype == torch.bfloat16 and new.weights[0].dtype == torch.float32


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
        (dict(reset=torch.zeros(2, 2, dtype=torch.bool)), "reset must be"),
    ],
)
def test_bad_input(change, message):
    x = make(9, 2)
    state, initial = states(x, 2)
    names = ("q", "k", "v", "forget", "momentum", "lr")
    tokens = [change.get(n, x[n]) for n in names]
    options = dict(chunk_size=4, initial_state=initial) | {n: c for n, c in change.items() if n not in names}
    with pytest.raises(ValueError, match=message):
        memory_scan(*tokens, state, **options)


def test_bad_state():
    x = make(9, 2)
    state, initial = states(x, 2)
    with pytest.raises(ValueError, match="float32"):
        memory_scan(*arguments(x), MemoryState(tuple(w.half() for w in state.weights), state.surprise), chunk_size=4)
    _, half = memory_scan(*arguments(x), state, chunk_size=4)
    with pytest.raises(ValueError, match="half-read"):
        memory_scan(*arguments(x), half, chunk_size=4, initial_state=initial, reset=torch.ones(2, 3, dtype=torch.bool))
