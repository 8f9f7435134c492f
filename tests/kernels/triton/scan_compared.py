"""The kernels against the oracle in float64, at sizes that the interpreter can bear."""

import itertools

import torch
from scan_cases import arguments, assert_equal, gradients, make, states, tensors

from titans_pretrain.kernels.memory_scan import memory_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of outputs and states, and of gradients; relative, by norm.
TOLERANCE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (1e-2, 2e-2), torch.float16: (2e-3, 4e-3)}
ROUNDINGS = 6  # the kernels round inputs, kept states and operands; the most that was seen in 24 calls is 3.2


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


def compare(x, depth, cuts=(), *, only=None, tolerance=None, conditioned=False, **options):
    """Outputs, final state and every gradient, in parts, against the oracle's one call. only: options of the kernels alone.

    conditioned: a gradient may be as wrong as `ROUNDINGS` times what one rounding of the inputs makes of it. For calls where nearly
    all of a gate's gradient is one number, a sum that may cancel: relative to itself it is then as inexact as one likes.
    """
    outputs, of_gradients = tolerance or TOLERANCE[x["q"].dtype]
    exact = doubled(x)
    found = scan_in_parts(x, depth, cuts, backend="triton", **options, **(only or {}))
    expected = scan_in_parts(exact, depth, (), backend="reference", **options)
    for i, (p, r) in enumerate(zip(found, expected, strict=True)):
        assert_equal(p, r, outputs, f"output {i}")
    wanted = gradients(expected, exact)
    moved = moved_by_rounding(x, depth, wanted, options) if conditioned else {}
    for name, p in gradients(found, x).items():
        assert p.dtype == x[name].dtype
        r = wanted[name]
        conditioning = ROUNDINGS * moved.get(name, 0.0) / r.norm().clamp_min(1e-3).item()
        assert_equal(p, r, max(of_gradients, conditioning), f"gradient of {name}")


def moved_by_rounding(x, depth, base, options, draws=4):
    """Root mean square of how far each of the oracle's gradients, `base`, goes when every input but the gates, which stay at the ends
    of their ranges, is moved by up to one rounding of q's dtype."""
    generator = torch.Generator().manual_seed(0)
    squares = dict.fromkeys(base, 0.0)
    for _ in range(draws):
        y = doubled(x)
        with torch.no_grad():
            for name in sorted(y.keys() - {"forget", "momentum", "lr"}):
                noise = 2 * torch.rand(y[name].shape, generator=generator, dtype=torch.float64) - 1
                y[name].mul_(1 + torch.finfo(x["q"].dtype).eps / 2 * noise.to(DEVICE))
        for name, d in gradients(scan_in_parts(y, depth, (), backend="reference", **options), y).items():
            squares[name] += (d - base[name]).square().sum().item() / draws
    return {name: square**0.5 for name, square in squares.items()}
