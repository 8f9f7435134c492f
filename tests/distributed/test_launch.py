"""Processes of a training: agreement at the start, signals, and a lost process."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from processes import CLOCKS, ROOT, ForkedProcesses, StartedProcesses, arguments, metrics, wait_for_step


def train(world: int, *command: str) -> list[tuple[int, str]]:
    return StartedProcesses(world, [list(command)] * world).wait()


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
            for key in line.keys() - CLOCKS:
                assert line[key] == pytest.approx(expected[key], rel=1e-3), (key, line)


def test_processes_that_were_started_differently_say_so(data, tmp_path):
    commands = [arguments(data, tmp_path / "run", **{"train.lr": lr, "train.min_lr": 0}) for lr in (1e-3, 2e-3)]
    for code, output in ForkedProcesses(tmp_path / "logs", 2, commands).wait():
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
    processes = ForkedProcesses(tmp_path / "logs", 3, [arguments(data, run_dir, **settings)] * 3)
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
    processes = StartedProcesses(2, [arguments(data, run_dir, **{"train.steps": 100000, "parallel.cp": 2})] * 2)
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
    results = StartedProcesses(2, [arguments(data, run_dir, **settings)] * 2, {1: HANG}).wait(timeout=300)
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
    processes = StartedProcesses(2, [arguments(data, run_dir, **{"train.steps": 300, "train.global_batch": 2})] * 2)
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
