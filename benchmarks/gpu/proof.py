"""Part 1, proof: is what this machine computes right? Witnesses in whole numbers, errors against float64, runs that repeat, compilers."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict

import torch

from benchmarks.gpu.harness import Session, digest, gradients, relative_error, scan_call, served_backend
from titans_pretrain.commands.machine import PTXAS, faults, this_machine
from titans_pretrain.kernels.memory_scan import MemoryState, memory_scan

LIMITS = {"float32": (2e-5, 2e-5), "bfloat16": (1e-2, 2e-2)}  # of outputs and states, of gradients
ROWS = [(1, 1), (2, 4), (2, 1), (2, 2)]  # depth, expansion of the memory
CHUNKS = [16, 64, 512]


def proof(s: Session) -> None:
    machine = this_machine()
    s.write(machine=asdict(machine), faults=faults(machine), test="machine")
    s.point(lambda test, dtype: witness(s.device, dtype), test="witness", dtype="float32")
    s.point(lambda test, dtype: witness(s.device, dtype), test="witness", dtype="bfloat16")
    for path in assemblers(machine):
        s.point(lambda test, ptxas: probe(s, ptxas), test="probe", ptxas=path)
    for dtype in LIMITS:
        for depth, expansion in ROWS[:2] if s.quick else ROWS:
            for chunk in CHUNKS[:1] if s.quick else CHUNKS:
                s.point(
                    lambda test, **row: errors(s.device, **row), test="errors", depth=depth, expansion=expansion, chunk=chunk, dtype=dtype
                )  # fmt: skip
    for depth, expansion in ROWS[:2]:
        s.point(lambda test, **row: repeats(s, **row), test="repeats", depth=depth, expansion=expansion)
    s.point(lambda test: sanitizer(s), test="sanitizer")


def witness(device: torch.device, dtype: str) -> dict:
    """A linear memory on small whole numbers with gates of 0 and 1: every intermediate is a whole number that bfloat16 holds, so each
    way to compute must give the same bits as float64 does."""
    T, C, H, D = 34, 16, 2, 64
    random = torch.Generator().manual_seed(0)

    def integers(*shape: int, low: int = -1, high: int = 1) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=random).double()

    q = torch.zeros(1, T, H, D, dtype=torch.float64)
    k = torch.zeros_like(q)
    for x in (q, k):
        x.scatter_(-1, torch.randint(0, D, (1, T, H, 1), generator=random), integers(1, T, H, 1) * 2 + 1)
    k = k.clamp(-1, 1) * (torch.arange(T) % 5 == 1)[None, :, None, None]  # a handful of tokens write
    v, w = integers(1, T, H, D), integers(H, D, D)
    forget, momentum, lr = ((torch.rand(1, T, H, 1, generator=random) < p).double() for p in (0.1, 0.2, 0.5))
    d_y = integers(1, T, H, D) * (torch.arange(T) % 7 == 3)[None, :, None, None]

    def run(place: dict, values: torch.dtype, backend: str):
        leaves = [x.to(**place).requires_grad_() for x in (q, k, v, forget, momentum, lr, w)]
        leaves[2] = leaves[2].detach().to(values).requires_grad_()
        start = MemoryState.initial((leaves[6],), 1)
        y, state = memory_scan(*leaves[:6], start, chunk_size=C, backend=backend)
        grads = torch.autograd.grad(y, leaves, d_y.to(y))
        return [x.detach().double().cpu() for x in (y, *state.weights, *state.surprise, *grads)]

    exact = run({"dtype": torch.float64}, torch.float64, "reference")
    found = run({"dtype": torch.float32, "device": device}, getattr(torch, dtype), "auto")
    names = ("y", "weights", "surprise", "d_q", "d_k", "d_v", "d_forget", "d_momentum", "d_lr", "d_weights")
    wrong = [n for n, a, b in zip(names, found, exact, strict=True) if not torch.equal(a, b)]
    largest = max(float(x.abs().max()) for x in exact)
    assert largest <= 256 and all(torch.equal(x, x.round()) for x in exact), "the witness is no witness"
    return {"exact": not wrong, "wrong": wrong, "largest": largest}


def assemblers(machine) -> list[str]:
    """Each ptxas that is here, once."""
    found = [
        machine.ptxas.path if machine.ptxas else None,
        machine.newer_ptxas,
        shutil.which("ptxas"),
        "/usr/local/cuda/bin/ptxas",
    ]
    return list(dict.fromkeys(os.path.realpath(p) for p in found if p and os.path.exists(p)))


def probe(s: Session, ptxas: str) -> dict:
    """Whether the driver loads what this assembler made, and whether it computes rightly."""
    from titans_pretrain.commands.machine import ptxas_version

    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {PTXAS: ptxas, "TRITON_CACHE_DIR": cache}
        if s.device.type == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        found = _run_probe(s, environment, [])
    return found | {"version": ptxas_version(ptxas), "loaded": True}


def _run_probe(s: Session, environment: dict, before: list[str], timeout: float = 120) -> dict:
    command = [*before, sys.executable, "-m", "benchmarks.gpu.probe", "--device", s.device.type]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    found = json.loads(lines[-1]) | {"output": done.stdout[-2000:] if before else ""}
    return {k: v for k, v in found.items() if v != "" and k != "ptxas"}


def errors(device: torch.device, depth: int, expansion: int, chunk: int, dtype: str) -> dict:
    """The scan as it would run, against the dual form in float64 on the same rounded numbers."""
    shape = dict(
        depth=depth,
        expansion=expansion,
        chunk=chunk,
        batch=2,
        tokens=2 * chunk + 7,
        heads=2,
        dtype=getattr(torch, dtype),
    )
    call, leaves = scan_call(device, **shape)
    found = gradients(call, leaves)
    exact = gradients(*scan_call(device, **shape, exact=True, backend="chunked"))
    all_errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
    names = ["y", *(f"state{i}" for i in range(depth)), *(f"d_{n}" for n in leaves)]
    out, back = max(all_errors[: depth + 1]), max(all_errors[depth + 1 :])
    limits = LIMITS[dtype]
    return {
        "backend": served_backend(call), "output_error": out, "gradient_error": back, "held": out <= limits[0] and back <= limits[1],
        "each": dict(zip(names, all_errors, strict=True)),
    }  # fmt: skip


def repeats(s: Session, depth: int, expansion: int, runs: int = 20) -> dict:
    """How many different results a number of runs give."""
    tokens = 100 if s.quick else 1000
    dtype = torch.bfloat16 if s.device.type == "cuda" else torch.float32
    call, leaves = scan_call(
        s.device, depth=depth, expansion=expansion, chunk=16, batch=2, tokens=tokens, heads=4, dtype=dtype
    )
    found = {digest(gradients(call, leaves)) for _ in range(runs)}
    return {"backend": served_backend(call), "runs": runs, "different": len(found)}


def sanitizer(s: Session) -> dict:
    tool = shutil.which("compute-sanitizer")
    if tool is None or s.device.type == "cpu":
        return {"skipped": "no compute-sanitizer here" if tool is None else "for GPUs"}
    found = _run_probe(s, dict(os.environ), [tool, "--tool", "memcheck"], timeout=150)
    summary = re.search(r"ERROR SUMMARY: (\d+) error", found.pop("output", ""))
    return found | {"errors": int(summary[1]) if summary else None}
