"""The sbatch templates, with stand-ins for Slurm's and this package's commands that write down how they were called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TEMPLATES = Path(__file__).parents[2] / "slurm"


def run(tmp_path, template, *arguments, env=None, codes=None):
    """Runs a template with stand-in commands (name -> exit code); returns the process and the calls."""
    commands = dict.fromkeys(("srun", "scontrol", "scancel", "titans-data"), 0) | (codes or {})
    for name, code in commands.items():
        stub = tmp_path / name
        stub.write_text(f'#!/bin/bash\necho "{name} $*" >> "{tmp_path}/calls"\nexit {code}\n')
        stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"} | (env or {})
    process = subprocess.run(
        ["bash", str(TEMPLATES / template), *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    calls = tmp_path / "calls"
    return process, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("code, requeued", [(0, False), (85, True), (2, False)])
def test_train_goes_back_into_the_queue_only_when_it_saved(tmp_path, code, requeued):
    process, calls = run(tmp_path, "train.sbatch", "configs/tiny.yaml", "train.steps=3", codes={"srun": code})
    assert calls[0] == "srun titans-pretrain train configs/tiny.yaml train.steps=3"
    assert ("scontrol requeue 7" in calls) == requeued
    assert process.returncode == (0 if requeued else code)


def test_train_passes_a_signal_on_and_waits(tmp_path):
    """The trap ends bash's `wait` early; the template waits on for the step and takes its exit code."""
    (tmp_path / "slow").write_text('#!/bin/bash\ntouch "$1/started"\nfor _ in $(seq 40); do sleep 0.1; done\nexit 85\n')
    (tmp_path / "slow").chmod(0o755)
    process, _ = run(tmp_path, "train.sbatch")
    assert process.returncode == 2
    (tmp_path / "srun").write_text(f'#!/bin/bash\nexec "{tmp_path}/slow" "{tmp_path}"\n')
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", str(TEMPLATES / "train.sbatch"), "x.yaml"], env=environment)
    try:
        while not (tmp_path / "started").exists():
            assert job.poll() is None
        subprocess.run(["kill", "-USR1", str(job.pid)], check=True)
        assert job.wait(60) == 0
    finally:
        job.kill()
    assert (tmp_path / "calls").read_text().splitlines() == ["scancel --signal=USR1 7", "scontrol requeue 7"]


def test_tokenize_takes_its_part_of_the_array(tmp_path):
    env = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_CPUS_PER_TASK": "4"}
    _, calls = run(tmp_path, "tokenize.sbatch", "corpus", "tok", "data", "--deduplicate", env=env)
    assert calls == ["titans-data tokenize corpus --tokenizer tok --out data --workers 4 --shard 2/8 --deduplicate"]


@pytest.mark.parametrize("template", sorted(p.name for p in TEMPLATES.glob("*.sbatch")))
def test_usage(tmp_path, template):
    process, calls = run(tmp_path, template)
    assert process.returncode == 2 and "usage: sbatch" in process.stderr and not calls


@pytest.mark.skipif(not (shutil.which("sbatch") and os.environ.get("SLURM_CONF")), reason="needs a running Slurm")
@pytest.mark.parametrize("template", sorted(p.name for p in TEMPLATES.glob("*.sbatch")))
def test_slurm_accepts_the_template(template):
    process = subprocess.run(["sbatch", "--test-only", str(TEMPLATES / template)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
