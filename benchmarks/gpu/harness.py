"""What the parts share: where results go, when to stop, how a call is timed."""

import gc
import hashlib
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

GIB = 2**30
HEAD = 64  # D, the size of a memory


@dataclass
class Session:
    """A part's run: its points go to a file line by line, so that what stops it later takes nothing back."""

    file: Path
    device: torch.device
    until: float  # time.time() at which no further point begins
    quick: bool = False
    points: list[dict] = field(default_factory=list)

    def write(self, **point) -> dict:
        self.points.append(point)
        with self.file.open("a") as f:
            f.write(json.dumps(point) + "\n")
        return point

    def point(self, measure: Callable[..., dict], **settings) -> dict | None:
        """The settings and what `measure` finds at them; or why there is nothing: no time left, no memory, a failure."""
        if time.time() > self.until:
            return self.write(**settings, skipped="the clock is spent")
        start = time.perf_counter()
        try:
            return self.write(**settings, **measure(**settings), took=round(time.perf_counter() - start, 2))
        except torch.OutOfMemoryError:
            self.write(**settings, skipped="out of memory")
        except (
            RuntimeError,
            ValueError,
            ImportError,
            AssertionError,
            TypeError,
            OSError,
            subprocess.SubprocessError,
        ) as e:
            self.write(**settings, failed=f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    call: Callable[[], object], device: torch.device, budget: float = 1.0, most: int = 20
) -> tuple[float, float]:
    """The median of repetitions within about `budget` seconds (three at least, unless one takes longer), and the first call's own."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    first = time.perf_counter() - start
    times: list[float] = []
    while len(times) < (3 if first < budget else 1) or (sum(times) < budget and len(times) < most):
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times), first


def peak_gib(call: Callable[[], object], device: torch.device) -> float:
    """The most that the allocator held in a call, above what it held before; 0 on a CPU, which nobody asks."""
    if device.type != "cuda":
        call()
        return 0.0
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / GIB


def ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    """What this card reaches: FLOP/s of a large product in bfloat16, bytes/s of a large copy (read and written)."""
    size, count = (256, 1 << 16) if quick else (8192, 1 << 29)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product, _ = seconds_of(lambda: a @ b, device)
    x = torch.ones(count, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy, _ = seconds_of(lambda: y.copy_(x), device)
    return {"flops_per_second": 2 * size**3 / product, "bytes_per_second": 2 * x.nbytes / copy}


def digest(tensors: Iterable[Tensor]) -> str:
    """Of the bits."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """RMS of the difference over the RMS of what is exact."""
    exact = exact.double()
    return float((found.double().to(exact.device) - exact).norm() / exact.norm().clamp_min(1e-30))


# The scan's inputs


def scan_call(
    device: torch.device, *, depth: int, expansion: int, chunk: int, batch: int, tokens: int, heads: int, dtype: torch.dtype,
    backend: str = "auto", exact: bool = False, seed: int = 0,
) -> tuple[Callable[[], Sequence[Tensor]], dict[str, Tensor]]:  # fmt: skip
    """A memory_scan as a model calls it, and its leaves. dtype: of values and outputs; exact: the same numbers in float64."""
    from titans_pretrain.kernels.memory_scan import MemoryState, memory_scan

    random = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if exact else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device, dtype=torch.float32)

    shape = (batch, tokens, heads, HEAD)
    q, k = (torch.nn.functional.normalize(draw(*shape), dim=-1).to(dtype) for _ in range(2))
    leaves = {"q": q, "k": k, "v": draw(*shape).to(dtype)}
    leaves = {n: x.to(torch.float64) if exact else x for n, x in leaves.items()}
    for name, high in (("forget", 0.02), ("momentum", 0.9), ("lr", 0.1)):
        leaves[name] = (high * torch.sigmoid(draw(batch, tokens, heads, 1))).to(wide)
    hidden = expansion * HEAD
    widths = [HEAD, HEAD] if depth == 1 else [HEAD, hidden, HEAD]
    for i in range(depth):
        leaves[f"weights{i}"] = draw(heads, widths[i], widths[i + 1]).to(wide) / widths[i] ** 0.5
    for x in leaves.values():
        x.requires_grad_()

    def call():
        start = MemoryState.initial(tuple(leaves[f"weights{i}"] for i in range(depth)), batch)
        y, state = memory_scan(
            leaves["q"], leaves["k"], leaves["v"], leaves["forget"], leaves["momentum"], leaves["lr"] / chunk**0.5, start,
            chunk_size=chunk, residual_norm=True, damping=1.0, forget_to="initial", initial_state=start, backend=backend,
        )  # fmt: skip
        return y, *state.weights

    return call, leaves


def gradients(call: Callable[[], Sequence[Tensor]], leaves: dict[str, Tensor], seed: int = 1) -> list[Tensor]:
    """Outputs, and gradients of a fixed linear functional of the first one."""
    y, *rest = call()
    random = torch.Generator(y.device).manual_seed(seed)
    weight = torch.randn(y.shape, generator=random, device=y.device).to(y.dtype)
    return [y, *rest, *torch.autograd.grad(y, list(leaves.values()), weight)]


def served_backend(call: Callable[[], object]) -> str:
    """The name of the backend that serves a memory_scan."""
    from unittest import mock

    from titans_pretrain.kernels import backends
    from titans_pretrain.kernels.memory_scan import contract

    names: list[str] = []

    def choose(*args):
        taken = backends.choose(*args)
        names.append(taken.name)
        return taken

    with mock.patch.object(contract, "choose", choose):
        call()
    return names[-1]
