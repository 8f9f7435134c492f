"""The kernels against the oracle in float64, at sizes that the interpreter can bear."""

import itertools

import torch
from scan_cases import arguments, assert_equal, gradients, make, states, tensors

from titans_pretrain.kernels.memory_scan import memory_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of outputs and states, and of gradients; relative, by norm.
TOLERANCE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (1e-2, 2e-2), torch.float16: (2e-3, 4e-3)}


def inputs(tokens, depth, *, dtype=torch.float32, forget=0.5, **sizes):
    """As scan_cases.make, with q, k and v in `dtype` and the rest in float32. forget: the most of it: where much is forgotten, z can be
    so small that the norm blows up what was rounded."""
    x = make(tokens, depth, dtype=torch.float32, device=DEVICE, **sizes)
    x["forget"] = x["forget"].detach() * forget
    return {n: t.detach().to(dtype if n in ("q", "k", "v") else t.dtype).requires_grad_() for n, t in x.items()}


def doubled(x):
    return {n: t.detach().double().requires_grad_() for n, t in x.items()}


def scan_in_parts(x, depth, cuts, *, reset=None, chunk_size, **options):
    """Outputs and final state of one call for each part between `cuts`, the state handed on."""
    state, initial = states(x, depth)
    ys = []
    for start, stop in itertools.pairwise((0, *cuts, x["q"].shape[1])):
        here = None
        if reset is not None:
            here = reset[:, start // chunk_size : -(-stop // chunk_size)].clone()
            here[:, 0] &= start % chunk_size == 0
        y, state = memory_scan(
            *arguments(x, start, stop), state, initial_state=initial, reset=here, chunk_size=chunk_size, **options
        )
        ys.append(y)
    return tensors(torch.cat(ys, 1), state)


def compare(x, depth, cuts=(), *, only=None, tolerance=None, **options):
    """Outputs, final state and every gradient, in parts, against the oracle's one call. only: options of the kernels alone."""
    outputs, of_gradients = tolerance or TOLERANCE[x["q"].dtype]
    exact = doubled(x)
    found = scan_in_parts(x, depth, cuts, backend="triton", **options, **(only or {}))
    expected = scan_in_parts(exact, depth, (), backend="reference", **options)
    for i, (p, r) in enumerate(zip(found, expected, strict=True)):
        assert_equal(p, r, outputs, f"output {i}")
    for (name, p), r in zip(gradients(found, x).items(), gradients(expected, exact).values(), strict=True):
        assert p.dtype == x[name].dtype
        assert_equal(p, r, of_gradients, f"gradient of {name}")
