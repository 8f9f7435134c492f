"""The sbatch templates: with stand-ins for Slurm's and this package's commands that write down how they were called, and, where
there is one, in a running Slurm."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

TEMPLATES = Path(__file__).parents[2] / "slurm"
JOB = {"SLURM_JOB_ID": "70007", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_CPUS_PER_TASK": "8"}

# Options end at the command, which runs once per task, all of them alike: the step's exit code is the highest of theirs.
SRUN = """while [[ $1 == --* ]]; do shift; done
for task in 0 1 2 3; do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 "$@" || code=$?
done
exit ${code:-0}"""
TITANS = 'echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, $MASTER_ADDR:$MASTER_PORT" >> "$CALLS"\nexit $CODE'
SCONTROL = 'if [ "$1" = show ]; then printf "node3\\nnode4\\n"; fi'


def run(tmp_path, template, *arguments, env=None, code=0, **stubs):
    """Runs a template among stand-in commands; returns the process and the calls. code: what `titans-pretrain` exits with."""
    commands = {"srun": SRUN, "titans-pretrain": TITANS, "scontrol": SCONTROL, "scancel": "", "titans-data": ""} | stubs
    for name, script in commands.items():
        stub = tmp_path / name
        stub.write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{script}\n')
        stub.chmod(0o755)
    calls = tmp_path / "calls"
    environment = os.environ | JOB | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)} | (env or {})
    process = subprocess.Popen(
        ["bash", str(TEMPLATES / template), *arguments], env=environment | {"CODE": str(code)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, lambda: calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("code, requeued", [(0, False), (85, True), (2, False)])
def test_train_goes_back_into_the_queue_only_when_it_saved(tmp_path, code, requeued):
    process, calls = run(tmp_path, "train.sbatch", "configs/tiny.yaml", "run.name=two words", code=code)
    process.communicate(timeout=300)
    assert process.returncode == (0 if requeued else code)
    assert ("scontrol requeue 70007" in calls()) == requeued
    assert calls().count("titans-pretrain train configs/tiny.yaml run.name=two words") == 4


def test_train_tells_each_task_its_rank(tmp_path):
    process, calls = run(tmp_path, "train.sbatch", "configs/tiny.yaml")
    process.communicate(timeout=300)
    assert [line for line in calls() if line.startswith("rank")] == [
        f"rank {rank} of 4, local {rank % 2}, node3:20007" for rank in range(4)
    ]


def test_train_passes_a_signal_on_and_waits(tmp_path):
    """The trap ends bash's `wait` early; the template waits on for the step and takes its exit code."""
    slow = 'echo started >> "$CALLS"\nfor _ in $(seq 40); do sleep 0.1; done\nexit 85'
    job, calls = run(tmp_path, "train.sbatch", "x.yaml", srun=slow)
    try:
        while "started" not in calls():
            assert job.poll() is None
        subprocess.run(["kill", "-USR1", str(job.pid)], check=True)
        assert job.wait(60) == 0
    finally:
        job.kill()
    assert calls()[-2:] == ["scancel --signal=USR1 70007", "scontrol requeue 70007"]


def test_tokenize_takes_its_part_of_the_array(tmp_path):
    env = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_CPUS_PER_TASK": "4"}
    process, calls = run(tmp_path, "tokenize.sbatch", "corpus", "tok", "data", "--deduplicate", env=env)
    process.communicate(timeout=300)
    assert calls() == ["titans-data tokenize corpus --tokenizer tok --out data --workers 4 --shard 2/8 --deduplicate"]


@pytest.mark.parametrize("template", sorted(p.name for p in TEMPLATES.glob("*.sbatch")))
def test_usage(tmp_path, template):
    process, calls = run(tmp_path, template)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and "usage: sbatch" in errors and not calls()


needs_slurm = pytest.mark.skipif(
    not (shutil.which("sbatch") and os.environ.get("SLURM_CONF")), reason="needs a running Slurm"
)


@needs_slurm
@pytest.mark.parametrize("template", sorted(p.name for p in TEMPLATES.glob("*.sbatch")))
def test_slurm_accepts_the_template(template):
    process = subprocess.run(["sbatch", "--test-only", str(TEMPLATES / template)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def slurm(*command) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def wait_until(condition, seconds: int, job: str, log: Path):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(
                f"{slurm('scontrol', 'show', 'job', job)}\n{log.read_text() if log.exists() else 'no log'}"
            )
        time.sleep(0.5)


@needs_slurm
@pytest.mark.slow
def test_two_tasks_save_at_a_signal_go_back_into_the_queue_and_go_on(data, tmp_path, monkeypatch):
    """`scancel --signal=USR1 --batch` is what Slurm does near the time limit."""
    pytest.importorskip("deepspeed")
    pytest.importorskip("megatron.core")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # the nodes are this machine
    run_dir, log = tmp_path / "run", tmp_path / "log"
    overrides = [f"data.path={data}", f"run.dir={run_dir}", "train.device=cpu", "parallel.cp=2", "train.eval_every=0"]
    overrides += ["train.checkpoint_every=0", "train.micro_batch=1", "train.steps=100000", "train.log_every=5"]
    options = ["--parsable", "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", f"--output={log}"]
    config = TEMPLATES.parent / "configs/tiny.yaml"
    job = slurm("sbatch", *options, TEMPLATES / "train.sbatch", config, *overrides).strip()

    def steps() -> list[int]:
        path = run_dir / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    try:
        wait_until(lambda: len(steps()) > 2, 180, job, log)
        slurm("scancel", "--signal=USR1", "--batch", job)
        wait_until(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job), 120, job, log)
        saved = int((run_dir / "checkpoints/latest").read_text().rpartition("-")[2])
        wait_until(
            lambda: len(steps()) > saved + 2, 300, job, log
        )  # a site may keep a requeued job waiting two minutes
    finally:
        slurm("scancel", job)
    assert f"goes on from {run_dir}/checkpoints/step-{saved:08d} (step {saved})" in log.read_text()
    assert steps() == list(range(1, len(steps()) + 1))
