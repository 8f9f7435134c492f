"""A job of several processes, killed at random again and again and started again, ends as one that nothing disturbs: bit for bit."""

import random
import signal
import time

import pytest
from processes import CLOCKS, ForkedProcesses, arguments, metrics

from titans_pretrain.checkpoint import latest_checkpoint, read_tensors, read_trainer

STEPS_PER_KILL = 3


def settings(world: int, kills: int) -> dict:
    return {
        "train.global_batch": world // 2,  # a row for each copy of the model
        "train.steps": STEPS_PER_KILL * kills + 6,
        "train.checkpoint_every": 1,
        "train.checkpoint_async": True,
        "train.eval_every": 5,
        "parallel.cp": 2,
        "parallel.zero_stage": 1,
        "parallel.lost_after_seconds": 5,
    }


def start(data, run_dir, world: int, kills: int) -> ForkedProcesses:
    return ForkedProcesses(run_dir.parent / "logs", world, [arguments(data, run_dir, **settings(world, kills))] * world)


def wait_for(run_dir, step: int, processes: ForkedProcesses) -> None:
    """Until a step's line is there, whatever else is; not longer than the processes live."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b'"lr"') >= step:
            return
        dead = [p for p in processes.running if p.poll() is not None]
        assert not dead, "\n".join(p.communicate()[0] for p in dead)
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in time")


@pytest.mark.parametrize(("world", "kills"), [(2, 5), pytest.param(4, 30, marks=pytest.mark.slow)])
def test_killed_processes_end_with_the_same_bits(data, tmp_path, world, kills):
    for code, output in start(data, tmp_path / "undisturbed", world, kills).wait(timeout=900):
        assert code == 0, output
    draw, run_dir = random.Random(kills), tmp_path / "killed"
    for i in range(kills):
        processes = start(data, run_dir, world, kills)
        try:
            wait_for(run_dir, STEPS_PER_KILL * i + 1, processes)
            time.sleep(draw.uniform(0, 1.0))
            victim = draw.randrange(world)
            processes.running[victim].send_signal(signal.SIGKILL)
            results = processes.wait(timeout=300)
        finally:
            processes.kill()
        codes = [code for code, _ in results]
        assert codes[victim] == -signal.SIGKILL or i == kills - 1, results  # the last one may come after the end
        assert all(code in (0, 1) for rank, code in enumerate(codes) if rank != victim), results
    for code, output in start(data, run_dir, world, kills).wait(timeout=900):
        assert code == 0, output
    ours, expected = (latest_checkpoint(tmp_path / name) for name in ("killed", "undisturbed"))
    assert read_trainer(ours) == read_trainer(expected)
    tensors = read_tensors(expected)
    assert all(t.equal(tensors[name]) for name, t in read_tensors(ours).items())
    lines = [
        [{k: v for k, v in line.items() if k not in CLOCKS} for line in metrics(tmp_path / name)]
        for name in ("killed", "undisturbed")
    ]
    assert lines[0] == lines[1]
