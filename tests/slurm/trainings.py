"""Trainings of configs/tiny.yaml on CPUs, as a user of a Slurm submits them."""

import contextlib
import io
import json
import os
from pathlib import Path
from unittest import mock

from titans_pretrain import cli

TEMPLATES = Path(__file__).parents[2] / "slurm"
STEPS = 40
PATIENCE = 600  # seconds; idle, nothing here takes a tenth of it
# Without tensor and pipeline parallelism two processes are two data-parallel ones.
TRAIN = (
    "train.device=cpu",
    "train.eval_every=0",
    "train.checkpoint_every=0",
    "train.micro_batch=1",
    "train.global_batch=2",
    "parallel.lost_after_seconds=10",
)


def losses(run: Path) -> dict[int, float]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return {(found := json.loads(line))["step"]: found["loss"] for line in lines if line.endswith("\n")}


def titans(slurm, *arguments: object) -> str:
    """What `titans-pretrain` prints to a user of this Slurm; in this process, which has imported torch."""
    with mock.patch.dict(os.environ, slurm.env), contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main([str(argument) for argument in arguments]) == 0
    return out.getvalue()


def submit(slurm, data: Path, run: Path, *settings: str, options=("--nodes", "2")) -> tuple[str, Path]:
    """Submits a training of configs/tiny.yaml; returns the job's number and its log."""
    told = titans(slurm, "submit", "tiny", *options, f"data.path={data}", f"run.dir={run}", *TRAIN, *settings)
    job = told.split()[1].rstrip(";")
    assert (
        told == f"job {job}; its log is {run}/jobs/{job}.log, and `titans-pretrain status {run}` says where it stands\n"
    )
    return job, run / f"jobs/{job}.log"
