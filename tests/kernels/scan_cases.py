"""Inputs of the memory scan, and how two backends are compared: outputs, final states and every gradient."""

import torch

from titans_pretrain.kernels.memory_scan import MemoryState, memory_scan

TOL = 1e-10
HEADS, DIM, HIDDEN = 2, 6, 10
TOKENS = ("q", "k", "v", "forget", "momentum", "lr")


def widths(depth, dim=DIM, hidden=None):
    return [dim, *[hidden or HIDDEN + i for i in range(depth - 1)], dim]


def make(
    tokens, depth, *, batch=2, heads=HEADS, gates=1, dim=DIM, hidden=None, seed=0, dtype=torch.float64, device="cpu"
):
    """Inputs with gates that contain exact 0 and 1; all require gradients. The same numbers on every device. hidden: F; None: one for
    each layer."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def gate(high):
        x = torch.rand(batch, tokens, heads, gates, generator=g, dtype=torch.float64) * high
        kind = torch.randint(0, 8, x.shape, generator=g)
        return torch.where(kind == 0, torch.zeros_like(x), torch.where(kind == 1, torch.full_like(x, high), x))

    x = {
        "q": randn(batch, tokens, heads, dim),
        "k": torch.nn.functional.normalize(randn(batch, tokens, heads, dim), dim=-1),
        "v": randn(batch, tokens, heads, dim),
        "forget": gate(1.0),
        "momentum": gate(1.0),
        "lr": gate(0.1),
    }
    w = widths(depth, dim, hidden)
    for i in range(depth):
        x[f"weight{i}"] = randn(batch, heads, w[i], w[i + 1]) / w[i] ** 0.5
        x[f"surprise{i}"] = 0.1 * randn(batch, heads, w[i], w[i + 1])
        x[f"init{i}"] = randn(1, heads, w[i], w[i + 1]) / w[i] ** 0.5
        x[f"init_surprise{i}"] = 0.1 * randn(1, heads, w[i], w[i + 1])
    return {name: t.to(device, dtype).requires_grad_() for name, t in x.items()}


def states(x, depth):
    def pick(name):
        return tuple(x[f"{name}{i}"] for i in range(depth))

    return MemoryState(pick("weight"), pick("surprise")), MemoryState(pick("init"), pick("init_surprise"))


def arguments(x, start=0, stop=None):
    return [x[n][:, start:stop] for n in TOKENS]


def run(x, depth, backend="auto", **options):
    state, initial = states(x, depth)
    return memory_scan(*arguments(x), state, initial_state=initial, backend=backend, **options)


def tensors(y, state):
    return [y, *state.weights, *state.surprise, *(state.anchor or ())]


def gradients(outputs, x, seed=1):
    """Gradients of a random linear functional of all outputs with respect to all inputs."""
    g = torch.Generator().manual_seed(seed)
    total = sum((o * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o)).sum() for o in outputs)
    grads = torch.autograd.grad(total, list(x.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if d is None else d for (n, t), d in zip(x.items(), grads, strict=True)}


def assert_equal(actual, expected, tol=TOL, name=""):
    error = (actual.double().cpu() - expected.double().cpu()).norm() / expected.double().norm().clamp_min(1e-3).cpu()
    assert error < tol, f"{name}: relative error {error:.2e}"


def compare(x, depth, options, backend="auto", only=None, tol=TOL):
    """A backend against the reference. only: options of the backend alone."""
    a = tensors(*run(x, depth, backend, **options, **(only or {})))
    b = tensors(*run(x, depth, "reference", **options))
    assert len(a) == len(b)
    for i, (p, r) in enumerate(zip(a, b, strict=True)):
        assert_equal(p, r, tol, f"output {i}")
    for (name, p), r in zip(gradients(a, x).items(), gradients(b, x).values(), strict=True):
        assert_equal(p, r, tol, f"gradient of {name}")
