"""Is this machine ready? What it is made of, which kernels it would run, known faults, and the memory scan against its oracle."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import ModuleType
from unittest import mock

import torch

from titans_pretrain.commands.machine import OPTIONAL, Machine, faults, this_machine, version_of
from titans_pretrain.kernels import backends
from titans_pretrain.kernels.attention import contract as attention
from titans_pretrain.kernels.attention import segment_attention, sliding_window_attention
from titans_pretrain.kernels.cross_entropy import contract as cross_entropy
from titans_pretrain.kernels.cross_entropy import linear_cross_entropy
from titans_pretrain.kernels.memory_scan import MemoryState, memory_scan, memory_step
from titans_pretrain.kernels.memory_scan import contract as scan_contract
from titans_pretrain.kernels.short_conv import causal_conv
from titans_pretrain.kernels.short_conv import contract as short_conv

WIDTH = 30  # of the names, in columns


def doctor(as_json: bool = False) -> int:
    """Prints one line per finding. Returns the exit code: 1 where a check failed or a known fault applies."""
    machine = this_machine()
    found = faults(machine)
    device = "cuda" if machine.gpus else "cpu"
    chosen: dict[str, tuple[str, str]] = {}
    checks = {
        "write access": _check_write(),
        "kernels": _tried(lambda: chosen.update(chosen_backends(device))),
        "memory scan": _tried(lambda: _check_scan("cpu")),
    }
    if device == "cuda":
        checks["memory scan on cuda"] = _tried(lambda: _check_scan(device))
        checks["memory scan on cuda, bf16"] = _tried(lambda: check_training_scan(device))
    if as_json:
        figures = asdict(machine) | {"titans": version_of("titans-pretrain"), "backends": chosen, "checks": checks}
        print(json.dumps(figures | {"faults": found}, indent=1))
    else:
        print("\n".join(_lines(machine, chosen, checks, found)))
    return int(any(checks.values()) or bool(found))


def _lines(m: Machine, chosen: dict, checks: dict[str, str], found: dict[str, str]) -> Iterator[str]:
    def line(name: str, text: object) -> str:
        return f"{name:<{WIDTH}}{'none' if text is None else text}"

    yield line("python", f"{m.python} on {m.system}")
    yield line("titans", version_of("titans-pretrain") or "not installed")
    yield line("torch", f"{m.torch}, {m.threads} threads")
    gpus = [f"{g.name} (sm_{g.capability[0]}{g.capability[1]}, {g.memory_gib:g} GiB)" for g in m.gpus]
    yield line("devices", f"{m.cores} CPU cores; {', '.join(gpus) if gpus else 'no GPU'}")
    if m.gpus or m.driver:
        yield line("driver", m.driver)
        yield line("CUDA", f"{m.cuda} (of torch)")
        yield line("NCCL", m.nccl)
    if m.ptxas:
        yield line("ptxas", f"{m.ptxas.version or 'cannot be run'} at {m.ptxas.path}")
    yield line("memory", f"{m.memory_free_gib} GiB free")
    yield line("disk", f"{m.disk_free_gib} GiB free in {os.getcwd()}")
    yield line("slurm", m.slurm or "not seen")
    for name, purpose in OPTIONAL.items():
        yield line(name, f"{m.packages.get(name) or 'not installed'} ({purpose})")
    for kernel, (name, refused) in chosen.items():
        yield line(kernel, f"backend {name}{f' ({refused})' if refused else ''}")
    for name, problem in checks.items():
        yield line(name, f"FAILED: {problem}" if problem else "ok")
    for name, told in found.items():
        yield line("FAULT", f"{told} [{name}]")
    yield "healthy" if not (any(checks.values()) or found) else "not healthy: see FAILED and FAULT above"


# Backends


def chosen_backends(device: str) -> dict[str, tuple[str, str]]:
    """kernel -> the backend that "auto" takes in training here, and why it takes none before that."""
    chosen: dict[str, tuple[str, str]] = {}
    with torch.no_grad(), contextlib.ExitStack() as patches:
        for module in (scan_contract, attention, cross_entropy, short_conv):
            patches.enter_context(_watching(module, chosen))
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        T, H, D, F = 64, 2, 64, 256
        q, k = (torch.nn.functional.normalize(draw(1, T, H, D, dtype=torch.float32), dim=-1) for _ in range(2))
        gates = [torch.full((1, T, H, 1), x, device=device) for x in (0.01, 0.5, 0.1)]
        state = MemoryState.initial((draw(H, D, F, dtype=torch.float32), draw(H, F, D, dtype=torch.float32)), 1)
        options = dict(chunk_size=16, residual_norm=True, damping=1.0, forget_to="initial", initial_state=state)
        memory_scan(q, k, draw(1, T, H, D), *gates, state, **options)
        memory_step(q[:, :1], k[:, :1], draw(1, 1, H, D), *(g[:, :1] for g in gates), state, **options)
        q, k, v = (draw(1, T, H, D) for _ in range(3))
        pair = (draw(4, H, D), draw(4, H, D))
        sliding_window_attention(q, k, v, window=32, persistent=pair)
        segment_attention(q, k, v, k, v, persistent=pair)
        causal_conv(draw(1, T, D), draw(D, 4))
        labels = torch.zeros(T, dtype=torch.int64, device=device)
        linear_cross_entropy(draw(T, D), draw(96, D), labels)
    return chosen


def _watching(module: ModuleType, chosen: dict[str, tuple[str, str]]):
    def choose(kernel: str, listed, wanted: str, arguments: dict):
        taken = backends.choose(kernel, listed, wanted, arguments)
        reasons = []
        for b in listed[: listed.index(taken)]:
            reasons.append(f"not {b.name}: {b.refuses(**arguments) or b.leaves(**arguments)}")
        chosen[kernel] = taken.name, "; ".join(reasons)
        return taken

    return mock.patch.object(module, "choose", choose)


# Checks: what is wrong, or ""


def _tried(check: Callable[[], str | None]) -> str:
    try:
        return check() or ""
    except Exception as e:  # whatever a compiler or a driver says is what a doctor is asked for
        return f"{type(e).__name__}: {' '.join(str(e).split())[:500]}"


def _check_write() -> str:
    try:
        with tempfile.TemporaryFile(dir="."):
            return ""
    except OSError as e:
        return f"{os.getcwd()} is not writable: {e.strerror}"


def _check_scan(device: str) -> str:
    """The default backend against the token loop, float64."""
    error = max(scan_errors(device, torch.float64, heads=2, size=8, hidden=16))
    return "" if error < 1e-10 else f"differs from its reference by {error:.1e} (relative), more than 1e-10"


def check_training_scan(device: str) -> str:
    """The default backend on what training gives it, against the token loop in float64."""
    error = max(scan_errors(device, torch.bfloat16, heads=2, size=64, hidden=256))
    return "" if error < 2e-2 else f"differs from its reference by {error:.1e} (relative), more than 2e-2"


def scan_errors(device: str, dtype: torch.dtype, heads: int, size: int, hidden: int) -> list[float]:
    """Relative errors of outputs, final weights and the gradient of the keys. dtype: of the values; queries, keys, gates and states are
    in float32 or better, as in a model."""
    results = {}
    exact = torch.promote_types(dtype, torch.float32)
    for backend in ("reference", "auto"):
        random = torch.Generator().manual_seed(0)
        place = (
            {"device": "cpu", "dtype": torch.float64} if backend == "reference" else {"device": device, "dtype": exact}
        )
        B, T = 2, 37

        def draw(*shape, random=random):
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(exact)

        q, k, v = (torch.nn.functional.normalize(draw(B, T, heads, size), dim=-1).to(**place) for _ in range(3))
        v = v.to(dtype).to(torch.float64 if backend == "reference" else dtype)
        forget, momentum, lr = ((s * torch.sigmoid(draw(B, T, heads, 1))).to(**place) for s in (0.1, 0.9, 0.1))
        weights = draw(heads, size, hidden) / size**0.5, draw(heads, hidden, size) / hidden**0.5
        initial = MemoryState.initial(tuple(w.to(**place) for w in weights), batch=B)
        k.requires_grad_()
        y, state = memory_scan(
            q, k, v, forget, momentum, lr, initial,
            chunk_size=16, residual_norm=True, forget_to="initial", initial_state=initial, backend=backend,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(y.square().sum(), k)
        results[backend] = [x.detach().double().cpu() for x in (y, *state.weights, gradient)]
    pairs = zip(results["auto"], results["reference"], strict=True)
    return [float((a - b).norm() / b.norm()) for a, b in pairs]
