"""What the benchmarks share: the command line, points measured in processes of their own, tables, bars."""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

GIB = 2**30


@dataclass
class Bar:
    """A promise about a measured number."""

    name: str
    measured: float
    limit: float
    unit: str
    at_least: bool = True

    @property
    def held(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        side = "at least" if self.at_least else "at most"
        return f"{self.name}: {self.measured:.3g} {self.unit}, {side} {self.limit:g}: {'held' if self.held else 'NOT HELD'}"


def argument_parser(doc: str) -> argparse.ArgumentParser:
    """A benchmark's command line, with the options that all of them have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all figures to a file")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bar is not held")
    return parser


def describe_setup(threads: int, *packages: str) -> dict[str, str]:
    """What the figures depend on besides the code."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", *packages))
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores; {threads} thread{'s' * (threads > 1)} used",
        "software": f"Python {platform.python_version()}, {versions}",
        "load": f"{os.getloadavg()[0]:.1f} at the start",
    }


def _cpu_model() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1].strip() if found else platform.machine()


def measure_missing(
    file: Path, points: Iterable[dict], measure: Callable[[dict], dict], settings: Sequence[str], setup: dict[str, str]
) -> list[dict]:
    """The lines of a file of results: a point, the settings it was measured with, what measure(point) found, and the setup. Points that
    have none yet are measured. Raises SystemExit where there are lines of other settings: they belong in no one table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for point in points:
        if others := [line["settings"] for line in lines if line["settings"] != list(settings)]:
            raise SystemExit(
                f"{file} has results with other settings ({' '.join(others[0]) or 'none'}): give another --out"
            )
        if any(point.items() <= line.items() for line in lines):
            continue
        lines.append(point | {"settings": list(settings)} | measure(point) | {"setup": setup})
        with file.open("a") as f:
            f.write(json.dumps(lines[-1]) + "\n")
        print(json.dumps({k: v for k, v in lines[-1].items() if k != "setup"}), flush=True)
    return lines


def describe_setups(lines: Sequence[dict]) -> str:
    """Of a file of results: each once; of those that differ in the load alone, its range."""
    loads: dict[str, list[float]] = {}
    for line in lines:
        setup = dict(line["setup"])
        load = setup.pop("load", "").split()
        loads.setdefault("\n".join(f"{k}: {v}" for k, v in setup.items()), []).extend(map(float, load[:1]))
    blocks = []
    for told, of in loads.items():
        ends = " to ".join(dict.fromkeys(f"{load:.1f}" for load in (min(of), max(of)))) if of else ""
        blocks.append(told + f"\nload: {ends} at the start" * bool(of))
    return "\n\n".join(blocks)


def seed_cells(found: Mapping[int, float], seeds: Sequence[int], digits: int = 1) -> list[str]:
    """A cell for each seed, empty where it was not measured, and the mean."""
    cells = [f"{found[seed]:.{digits}f}" if seed in found else "" for seed in seeds]
    return [*cells, f"{statistics.mean(found.values()):.{digits}f}"]


def finish(args: argparse.Namespace, setup: dict[str, str], points: list[dict], bars: list[Bar]) -> None:
    """Prints one line per bar, writes --json, and exits as --strict asks."""
    print()
    for bar in bars:
        print(bar)
    if args.json:
        figures = {"setup": setup, "points": points, "bars": [asdict(bar) | {"held": bar.held} for bar in bars]}
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    if args.strict and not all(bar.held for bar in bars):
        sys.exit(1)


def run_point(module: str, point: dict, threads: int = 1, processes: int = 1) -> dict:
    """`python -m MODULE --point POINT` in a process of its own; the JSON object it prints last.

    A process per point: its peak memory and its allocator's state are its own. With `processes`, that many under torchrun, of
    which one prints. Raises RuntimeError if it fails.
    """
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    )
    command = [sys.executable, *launcher, "-m", module, "--point", json.dumps(point)]
    # Idle threads would spin; without huge pages, page faults of blocks that glibc maps anew cost up to half of the time.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "THP_MEM_ALLOC_ENABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


Part = Callable[[argparse.Namespace], tuple[list[dict], list[Bar]]]  # prints a table; returns points and bars


def parts_parser(doc: str, parts: dict[str, Part]) -> argparse.ArgumentParser:
    """argument_parser for a benchmark of several parts, to be run by run_parts."""
    parser = argument_parser(doc)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), metavar="PART", help=" ".join(parts))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it works, not how fast")
    parser.add_argument("--point", type=json.loads, help="measure this point only, in these processes")
    return parser


def run_parts(args: argparse.Namespace, parts: dict[str, Part], measure: Callable[[dict], dict | None]) -> None:
    """The parts one after the other; or, in the processes that run_point starts, one point by `measure`, printed by the one that
    is given figures."""
    if args.point:
        from titans_pretrain.parallel.launch import leave_processes

        found = measure(args.point)
        leave_processes()
        if found is not None:
            print(json.dumps(found), flush=True)
        return
    setup = describe_setup(1, "deepspeed", "megatron-core")
    print("\n".join(f"{name}: {value}" for name, value in setup.items()) + "\n")
    points, bars = [], []
    for name in args.only:
        found, promised = parts[name](args)
        points += [{"part": name, **p} for p in found]
        bars += promised
    finish(args, setup, points, bars)


def flop_counter():
    """torch's FlopCounterMode, which by itself passes over the products that are added in place."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def product(_, a: torch.Size, b: torch.Size, **ignored) -> int:
        """Of [..., M, K] @ [..., K, N]."""
        return 2 * math.prod(a) * b[-1]

    in_place = {torch.ops.aten.baddbmm_: product, torch.ops.aten.addmm_: product}
    return FlopCounterMode(display=False, custom_mapping=in_place)


def resident_bytes(peak: bool = False) -> int:
    """Of this process now, or at most since reset_peak() (Linux)."""
    name = "VmHWM" if peak else "VmRSS"
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def best_cpu_seconds(call: Callable[[], object], repetitions: int) -> float:
    """CPU seconds of this process for a call, the best of some: what neighbours on the machine disturb least."""
    times = []
    for _ in range(repetitions):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)
