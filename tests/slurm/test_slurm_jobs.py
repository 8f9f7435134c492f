"""The templates and `titans-pretrain submit` in a running Slurm of two nodes, on CPUs."""

import json
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TEMPLATES = REPOSITORY / "slurm"
NO_GPU = ("--gpus-per-node=0",)
STEPS = 40
PATIENCE = 400  # seconds; idle, nothing here takes a tenth of it
# Without tensor and pipeline parallelism two processes are two data-parallel ones.
TRAIN = ("train.device=cpu", "train.eval_every=0", "train.checkpoint_every=0", "train.micro_batch=1", "train.global_batch=2")


def losses(run: Path) -> dict[int, float]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return {(found := json.loads(line))["step"]: found["loss"] for line in lines if line.endswith("\n")}


def submit(slurm, data: Path, run: Path, *settings: str, options=("--nodes", "2", "--gpus-per-node", "0")) -> tuple[str, Path]:
    """Submits a training of configs/tiny.yaml; returns the job's number and its log."""
    overrides = [f"data.path={data}", f"run.dir={run}", *TRAIN, *settings]
    told = slurm("titans-pretrain", "submit", "tiny", *options, *overrides)
    job = told.split()[1].rstrip(";")
    assert told == f"job {job}; its log is {run}/jobs/{job}.log, and `titans-pretrain status {run}` says where it stands\n"
    return job, run / f"jobs/{job}.log"


@pytest.fixture(scope="module")
def uninterrupted(slurm, data, tmp_path_factory) -> dict[int, float]:
    """The losses of a training on two nodes that nothing interrupts."""
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    job, log = submit(slurm, data, run, f"train.steps={STEPS}")
    assert slurm.ends(job, PATIENCE, log) == "COMPLETED", log.read_text()
    assert slurm.job(job)["Restarts"] == "0"
    assert "on 2 processes (dp 2)" in log.read_text()
    assert (run / f"jobs/{job}/rank-1.log").exists()
    for node in ("n1", "n2"):
        record = (run / f"jobs/{job}/environment-{node}-0.txt").read_text()
        assert f"SLURM_JOB_ID={job}" in record and "\ntorch==" in record
    found = losses(run)
    assert list(found) == list(range(1, STEPS + 1))
    return found


def test_two_nodes_go_back_into_the_queue_and_end_as_if_nothing_had_happened(slurm, data, uninterrupted, tmp_path):
    """`scancel --signal=USR1 --batch` is what Slurm does near the time limit."""
    run = tmp_path / "run"
    job, log = submit(slurm, data, run, f"train.steps={STEPS}")
    slurm.wait(lambda: len(losses(run)) > 1, PATIENCE, "the first steps", log)
    slurm("scancel", "--signal=USR1", "--batch", job)
    assert slurm.ends(job, PATIENCE, log) == "COMPLETED", log.read_text()
    assert slurm.job(job)["Restarts"] == "1", log.read_text()
    assert "goes on from" in log.read_text() and losses(run) == uninterrupted
    assert (run / f"jobs/{job}/environment-n1-1.txt").exists()
    status = slurm("titans-pretrain", "status", run).splitlines()
    assert status[0].startswith(f"step {STEPS}/{STEPS}, loss ") and status[0].endswith(", done")
    assert status[1].startswith(f"job {job} COMPLETED on n[1-2], ")
    assert status[2].startswith(f"newest checkpoint step-{STEPS:08d}, 0:")
