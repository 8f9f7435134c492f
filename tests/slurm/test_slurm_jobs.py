"""The templates and `titans-pretrain submit` in a running Slurm of two nodes, on CPUs."""

from pathlib import Path

import pytest
from trainings import PATIENCE, STEPS, TEMPLATES, losses, submit, titans


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
    status = titans(slurm, "status", run).splitlines()
    assert status[0].startswith(f"step {STEPS}/{STEPS}, loss ") and status[0].endswith(", done")
    assert status[1].startswith(f"job {job} COMPLETED on n[1-2], ")
    assert status[2].startswith(f"newest checkpoint step-{STEPS:08d}, 0:")


@pytest.mark.parametrize("template", sorted(path.name for path in TEMPLATES.glob("*.sbatch")))
def test_slurm_takes_the_template_as_it_is(slurm, template):
    slurm("sbatch", "--test-only", TEMPLATES / template)


def failure(slurm, tmp_path: Path, *arguments: str, **env: str) -> str:
    """The log of a job that has to fail, with exit code 2, before it trains."""
    log, run = tmp_path / "log", tmp_path / "run"
    overrides = [f"data.path={tmp_path}", f"run.dir={run}"]
    job = slurm(
        "sbatch", "--parsable", f"--output={log}", *arguments, *overrides, TITANS_SLURM=str(TEMPLATES), **env
    ).strip()
    assert slurm.ends(job, PATIENCE, log) == "FAILED"
    assert slurm.job(job)["ExitCode"] == "2:0" and not (run / "config.yaml").exists()
    return log.read_text()


def test_a_bad_config_fails_at_once_and_once(slurm, tmp_path):
    log = failure(
        slurm, tmp_path, "--nodes=2", "--gpus-per-node=0", TEMPLATES / "pretrain.sbatch", "tiny", "train.lr=-1"
    )
    assert log.count("error: ") == 2  # the second one is srun's
    assert "error: override 'train.lr=-1': train.lr must be 0 or more" in log


def test_a_node_without_its_gpus_is_named(slurm, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/bash\necho "GPU 0: H100"\n[ "$SLURMD_NODENAME" = n2 ] || echo "GPU 1: H100"\n')
    smi.chmod(0o755)
    options = ["--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2", TEMPLATES / "pretrain.sbatch", "tiny"]
    log = failure(slurm, tmp_path, *options, PATH=f"{tmp_path}:{slurm.env['PATH']}")
    assert "error: node n2: the job asked for 2 GPUs a node, and nvidia-smi sees 1" in log
    assert "node n1" not in log
