"""Processes of `titans-pretrain train` that nothing but themselves ends: started by hand, or forked from one that has imported everything,
which takes a tenth of the time."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from ranks import forked

ROOT = Path(__file__).parents[2]
# What of a step's line is a clock's.
STRAGGLERS = {"slowest_rank", "slowest_work", "slowest_over_median", "most_data_wait", "comm_wait"}
CLOCKS = {"tokens_per_second", "mfu", "data_wait", "checkpoint_stall", "peak_memory_mib"} | STRAGGLERS
MAIN = "import sys; from titans_pretrain.cli import main; sys.exit(main(sys.argv[1:]))"


def arguments(data: Path, run_dir: Path, **changes) -> list[str]:
    settings = {
        "data.path": data,
        "run.dir": run_dir,
        "data.seq_len": 64,
        "model.dim": 32,
        "model.layers": 2,
        "model.window": 16,
        "model.memory.heads": 2,
        "model.memory.chunk_size": 8,
        "model.heads": 2,
        "model.persistent_tokens": 2,
        "train.steps": 6,
        "train.micro_batch": 1,
        "train.global_batch": 4,
        "train.eval_every": 3,
        "train.eval_batches": 2,
        "train.warmup_steps": 2,
        "train.checkpoint_every": 3,
        "train.log_every": 1,
    }
    return ["configs/tiny.yaml", *(f"{k}={v}" for k, v in (settings | changes).items())]


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and any(line["step"] >= step for line in metrics(run_dir)):
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step} in time")


class Processes:
    """`world` processes, each with a command of its own."""

    def __init__(self, world: int, commands: list[list[str]]):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        common |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.running = [
            self._start(rank, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, commands[rank])
            for rank in range(world)
        ]

    def wait(self, timeout: float = 120.0) -> list[tuple[int, str]]:
        """Exit codes and outputs."""
        try:
            outputs = [p.communicate(timeout=timeout)[0] for p in self.running]
        finally:
            self.kill()
        return [(p.returncode, out) for p, out in zip(self.running, outputs, strict=True)]

    def kill(self) -> None:
        for p in self.running:
            p.kill()
            p.wait()


class StartedProcesses(Processes):
    """As users start them. before: Python code of some ranks, that runs first."""

    def __init__(self, world: int, commands: list[list[str]], before: dict[int, str] | None = None):
        self._before = before or {}
        super().__init__(world, commands)

    def _start(self, rank: int, environment: dict[str, str], command: list[str]) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", f"{self._before.get(rank, '')}\n{MAIN}", "train", *command],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )  # fmt: skip


class ForkedProcesses(Processes):
    """folder: of their outputs."""

    def __init__(self, folder: Path, world: int, commands: list[list[str]]):
        folder.mkdir(exist_ok=True)
        self._folder = folder
        super().__init__(world, commands)

    def _start(self, rank: int, environment: dict[str, str], command: list[str]) -> "Forked":
        return Forked(environment, command, self._folder / f"{id(self)}-{rank}.log")


class Forked:
    """What Processes needs of subprocess.Popen."""

    def __init__(self, environment: dict[str, str], command: list[str], log: Path):
        self._log = log
        self._process = forked(_run, environment, command, str(log))

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self._process.join(timeout)
        if self.poll() is None:
            raise TimeoutError(f"{self._log} ends so:\n{self._log.read_text()[-2000:]}")
        return self._log.read_text(), None

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()


def _run(environment: dict[str, str], command: list[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    from titans_pretrain.cli import main

    sys.exit(main(["train", *command]))
