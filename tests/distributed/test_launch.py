"""Processes started as users start them: agreement at the start, signals, and a lost process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STRAGGLERS = {"slowest_rank", "slowest_work", "slowest_over_median", "most_data_wait", "comm_wait"}  # clocks, too


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


MAIN = "import sys; from titans_pretrain.cli import main; sys.exit(main(sys.argv[1:]))"


class Processes:
    """`world` processes of `titans-pretrain train`, started by hand, so that nothing but themselves ends them. before: Python code of
    some ranks, that runs first."""

    def __init__(self, world: int, commands: list[list[str]], before: dict[int, str] | None = None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        common |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._before = before or {}
        self.running = [
            self._start(rank, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, commands[rank])
            for rank in range(world)
        ]

    def _start(self, rank: int, environment: dict[str, str], command: list[str]) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", f"{self._before.get(rank, '')}\n{MAIN}", "train", *command],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )  # fmt: skip

    def wait(self, timeout: float = 120.0) -> list[tuple[int, str]]:
        try:
            outputs = [p.communicate(timeout=timeout)[0] for p in self.running]
        finally:
            self.kill()
        return [(p.returncode, out) for p, out in zip(self.running, outputs, strict=True)]

    def kill(self) -> None:
        for p in self.running:
            p.kill()
            p.wait()


def train(world: int, *command: str) -> list[tuple[int, str]]:
    return Processes(world, [list(command)] * world).wait()


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and any(line["step"] >= step for line in metrics(run_dir)):
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step} in time")


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_under_another_layout(data, tmp_path):
    runs = {"plain": (1, {}), "cp2": (2, {"parallel.cp": 2}), "pp2": (2, {"parallel.pp": 2})}
    runs["pp2"][1]["train.resume"] = tmp_path / "cp2/checkpoints/step-00000003"
    for name, (world, layout) in runs.items():
        for code, output in train(world, *arguments(data, tmp_path / name, **layout)):
            assert code == 0, output
    plain, ring, pipeline = (metrics(tmp_path / name) for name in runs)
    assert [(line["step"], "loss" in line) for line in ring] == [(line["step"], "loss" in line) for line in plain]
    assert [line["step"] for line in pipeline if "loss" in line] == [4, 5, 6]
    for ours in (ring, pipeline):
        for line, expected in zip(
            ours[::-1], plain[::-1], strict=False
        ):  # from the end: the second one starts in the middle
            for key in (
                line.keys()
                - {"tokens_per_second", "mfu", "data_wait", "checkpoint_stall", "peak_memory_mib"}
                - STRAGGLERS
            ):
                assert line[key] == pytest.approx(expected[key], rel=1e-3), (key, line)


def test_processes_that_were_started_differently_say_so(data, tmp_path):
    commands = [arguments(data, tmp_path / "run", **{"train.lr": lr, "train.min_lr": 0}) for lr in (1e-3, 2e-3)]
    for code, output in Processes(2, commands).wait():
        assert code == 2
        assert "train.lr is 0.001 on rank 0 and 0.002 on rank 1" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_layout_that_does_not_fit_is_refused_at_once(data, tmp_path):
    for code, output in train(2, *arguments(data, tmp_path / "run", **{"parallel.tp": 4})):
        assert code == 2
        assert "2 processes do not divide into" in output


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_others_with_the_reason(data, tmp_path, victim):
    run_dir = tmp_path / "run"
    settings = {"train.steps": 100000, "train.global_batch": 3, "parallel.lost_after_seconds": 8}
    processes = Processes(3, [arguments(data, run_dir, **settings)] * 3)
    try:
        wait_for_step(run_dir, 4)
        processes.running[victim].send_signal(signal.SIGKILL)
        results = processes.wait(timeout=300)
    finally:
        processes.kill()
    for rank, (code, output) in enumerate(results):
        if rank != victim:
            assert code == 1
            assert re.search(f"rank {victim}.* (gave no sign of life|is gone)|\\(rank 0\\) is gone", output), output
    assert (run_dir / "checkpoints" / "latest").is_file()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_a_checkpoint(data, tmp_path):
    run_dir = tmp_path / "run"
    processes = Processes(2, [arguments(data, run_dir, **{"train.steps": 100000, "parallel.cp": 2})] * 2)
    try:
        wait_for_step(run_dir, 2)
        processes.running[1].send_signal(signal.SIGUSR1)
        results = processes.wait(timeout=300)
    finally:
        processes.kill()
    assert [code for code, _ in results] == [85, 85], results
    assert "the same command goes on from there" in results[0][1]
    last = [line for line in metrics(run_dir) if "loss" in line][-1]["step"]
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step-{last:08d}"


HANG = """
import time
from titans_pretrain.data.reader import Reader
draw = Reader.__next__
def __next__(self, count=[0]):
    count[0] += 1
    while count[0] > 9:
        time.sleep(0.1)
    return draw(self)
Reader.__next__ = __next__
"""


@pytest.mark.slow
def test_a_process_that_hangs_is_named_with_its_call(data, tmp_path):
    settings = {"train.steps": 100000, "train.global_batch": 2, "train.eval_every": 0, "parallel.hang_minutes": 0.1}
    run_dir = tmp_path / "run"
    results = Processes(2, [arguments(data, run_dir, **settings)] * 2, {1: HANG}).wait(timeout=300)
    assert (run_dir / "checkpoints/latest").read_text() == "step-00000009\n"
    for rank, (code, output) in enumerate(results):
        assert code == 86, output
        assert f"rank {rank} at step 10 hangs here:" in output
        assert re.search(
            r"error: no step was finished for 6 s: rank 1 is behind, at step 10 in _draw \(training/trainer.py, line \d+, calling "
            r"__next__\); rank 0 waits in _agree \(parallel/engine.py, line \d+, calling wrapper\)", output,
        ), output  # fmt: skip


@pytest.mark.slow
def test_a_process_that_is_stopped_for_a_while_ends_nothing(data, tmp_path):
    run_dir = tmp_path / "run"
    processes = Processes(2, [arguments(data, run_dir, **{"train.steps": 300, "train.global_batch": 2})] * 2)
    try:
        wait_for_step(run_dir, 4)
        processes.running[1].send_signal(signal.SIGSTOP)
        time.sleep(20)
        processes.running[1].send_signal(signal.SIGCONT)
        results = processes.wait(timeout=300)
    finally:
        processes.kill()
    assert [code for code, _ in results] == [0, 0], results


BLOCKED = (
    "import sys; sys.modules['megatron'] = sys.modules['deepspeed'] = None; from titans_pretrain.cli import main; "
)


@pytest.mark.slow
def test_one_process_needs_neither_megatron_nor_deepspeed(data, tmp_path):
    settings = {"train.recompute": "segment", "parallel.segments_per_rank": 4}
    command = arguments(data, tmp_path / "run", **settings)
    for world, expected in (1, 0), (2, 2):
        done = subprocess.run(
            [sys.executable, "-c", BLOCKED + f"sys.exit(main({['train', *command]!r}))"],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)},
        )  # fmt: skip
        assert done.returncode == expected, done.stderr
    assert "needs deepspeed and megatron-core: pip install 'titans-pretrain[distributed]'" in done.stderr
