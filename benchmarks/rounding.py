"""Which rounding to bfloat16 the memory scan's gradients feel: one at a time, in float64 otherwise. A minute on a CPU, no GPU.

    python -m benchmarks.rounding

A call of `chunked` in float64, where single values are rounded as the kernels store or multiply them; the figure is the largest relative
error, by norm, over the gradients of all inputs. Tokens are rounded before, for both sides.

    anchor      W at the chunk's start, in the inner gradient's products
    activation  a_1, likewise
    e_1, e_L    the deltas
    LN(z_L)     of the keys, kept for the backward pass
    states      before a tile, for the reads
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import argument_parser, describe_setup, finish
from titans_pretrain.evaluation.figures import markdown_table
from titans_pretrain.kernels.memory_scan import MemoryState, memory_scan
from titans_pretrain.kernels.memory_scan.chunked import backward, forward, network, scan

ROUNDED = ("anchor", "activation", "e_1", "e_L", "LN(z_L)", "states")
DIM, HIDDEN, TOKENS, CHUNK, HEADS, SEEDS = 16, 32, 37, 16, 2, 3


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


@contextmanager
def rounding(names: Sequence[str]) -> Iterator[None]:
    """These values are rounded in what `chunked` computes."""
    exact_gradient, exact_read, exact_gelu = scan.TORCH.inner_gradient, forward.read_layers, network.gelu

    def inner_gradient(k, v, weights, net, out=None):
        weights = [bf16(w) for w in weights] if "anchor" in names else weights
        activation = (lambda z: bf16(exact_gelu(z))) if "activation" in names else exact_gelu
        with mock.patch.object(network, "gelu", activation):
            found = exact_gradient(k, v, weights, net, out)
        if "e_1" in names:
            found.deltas[0] = bf16(found.deltas[0])
        if "e_L" in names:
            found.deltas[-1] = bf16(found.deltas[-1])
        if "LN(z_L)" in names and found.norm is not None:
            n = bf16(found.norm[0])
            found.norm = (n, *found.norm[1:3], 2 * (k + n - v))
        return found

    def read_layers(q, tile):
        return exact_read(q, replace(tile, state=[bf16(x) for x in tile.state]) if "states" in names else tile)

    object.__setattr__(scan.TORCH, "inner_gradient", inner_gradient)
    try:
        with (
            mock.patch.object(forward, "read_layers", read_layers),
            mock.patch.object(backward, "read_layers", read_layers),
        ):
            yield
    finally:
        object.__setattr__(scan.TORCH, "inner_gradient", exact_gradient)


def gradients(seed: int, forget: float, damping: float, forget_to: str, rounded: Sequence[str]) -> list[Tensor]:
    """Of a random functional of outputs and final state. forget: the most of alpha; the least is 0."""
    random = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def gate(high: float) -> Tensor:
        return high * torch.rand(1, TOKENS, HEADS, 1, generator=random, dtype=torch.float64)

    shape = (1, TOKENS, HEADS, DIM)
    tokens = [bf16(x) for x in (randn(*shape), torch.nn.functional.normalize(randn(*shape), dim=-1), randn(*shape))]
    tokens += [gate(forget), gate(1.0), gate(0.1)]
    weights = [randn(1, HEADS, a, b) / a**0.5 for a, b in ((DIM, HIDDEN), (HIDDEN, DIM))]
    initial = [randn(1, HEADS, a, b) / a**0.5 for a, b in ((DIM, HIDDEN), (HIDDEN, DIM))]
    leaves = [x.requires_grad_() for x in (*tokens, *weights, *initial)]
    states = [MemoryState(tuple(w), tuple(torch.zeros_like(x) for x in w)) for w in (weights, initial)]
    with rounding(rounded):
        y, state = memory_scan(
            *tokens, states[0], initial_state=states[1], chunk_size=CHUNK, residual_norm=True, damping=damping, forget_to=forget_to,
            backend="chunked",
        )  # fmt: skip
        total = sum((x * randn(*x.shape)).sum() for x in (y, *state.weights, *state.surprise))
        return torch.autograd.grad(total, leaves, allow_unused=True)


def worst(setting: tuple, rounded: Sequence[str]) -> float:
    """Over the seeds."""
    errors = []
    for seed in range(SEEDS):
        exact, found = gradients(seed, *setting, ()), gradients(seed, *setting, rounded)
        errors += [
            float((a - b).norm() / a.norm().clamp_min(1e-3)) for a, b in zip(exact, found, strict=True) if a is not None
        ]
    return max(errors)


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    setup = describe_setup(torch.get_num_threads())
    print("\n".join(f"{name}: {value}" for name, value in setup.items()))
    print(f"D {DIM}, F {HIDDEN}, {TOKENS} tokens, chunk {CHUNK}, {HEADS} heads; the worst of {SEEDS} seeds\n")
    points, rows = [], []
    for forget_to, damping in (("zero", 0.0), ("zero", 0.7), ("initial", 0.0), ("initial", 0.7)):
        for forget in (0.5, 1.0):
            found = {
                name: worst((forget, damping, forget_to), names)
                for name, names in (*((n, (n,)) for n in ROUNDED), ("all", ROUNDED))
            }
            points.append({"forget_to": forget_to, "damping": damping, "forget": forget, **found})
            rows.append([forget_to, f"{damping}", f"{forget}", *(f"{x:.1%}" for x in found.values())])
    print(markdown_table(["forget_to", "damping", "forget up to", *ROUNDED, "all"], rows))
    finish(args, setup, points, [])


if __name__ == "__main__":
    main()
