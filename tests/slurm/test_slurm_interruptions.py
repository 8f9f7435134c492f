"""What a cluster does to a job while it trains, in a running Slurm: node failures, preemption, the time limit, and its user's own end."""

import json
import re
import sys
import time
from unittest import mock

import pytest
from trainings import PATIENCE, STEPS, TEMPLATES, TRAIN, losses, submit, titans

pytestmark = pytest.mark.slow
FOREVER = "train.steps=20000"


@pytest.mark.parametrize("node", ["n2", "n1"])
def test_a_node_fails_and_the_job_goes_on_from_its_last_checkpoint(slurm, data, uninterrupted, tmp_path, node):
    """n1 has the job's script, task 0 and the run's lock."""
    run = tmp_path / "run"
    job, log = submit(slurm, data, run, f"train.steps={STEPS}", "train.checkpoint_every=4")
    slurm.wait(lambda: (run / "checkpoints/latest").exists() and len(losses(run)) > 5, PATIENCE, "a checkpoint", log)
    slurm.node_fails(node)
    try:
        slurm.wait(lambda: slurm.job(job)["Restarts"] == "1", PATIENCE, "the requeue", log)
        saved = int((run / "checkpoints/latest").read_text().rpartition("-")[2])
        assert saved < STEPS
    finally:
        slurm.node_up(node)
    assert slurm.ends(job, 2 * PATIENCE, log) == "COMPLETED", log.read_text()
    assert f"goes on from {run}/checkpoints/step-{saved:08d} (step {saved})" in log.read_text()
    assert losses(run) == uninterrupted


def test_an_urgent_job_takes_the_nodes_and_gives_them_back(slurm, data, uninterrupted, tmp_path):
    run = tmp_path / "run"
    job, log = submit(slurm, data, run, f"train.steps={STEPS}")
    slurm.wait(lambda: len(losses(run)) > 1, PATIENCE, "the first steps", log)
    urgent = slurm(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"
    ).strip()
    assert slurm.ends(urgent, PATIENCE, log) == "COMPLETED"
    assert slurm.ends(job, 2 * PATIENCE, log) == "COMPLETED", log.read_text()
    assert slurm.job(job)["Restarts"] == "1" and "goes on from" in log.read_text()
    assert losses(run) == uninterrupted


def test_near_the_time_limit_the_job_saves_and_goes_back_into_the_queue(slurm, data, tmp_path):
    """Of 3 minutes, 60 s before the end; Slurm may be a minute early."""
    run = tmp_path / "run"
    job, log = submit(slurm, data, run, FOREVER, options=("--time=3", "--sbatch=--signal=B:USR1@60"))
    slurm.wait(lambda: slurm.job(job)["Restarts"] == "1", 200, "the requeue", log)
    saved = int((run / "checkpoints/latest").read_text().rpartition("-")[2])
    slurm.wait(lambda: len(losses(run)) > saved + 1, PATIENCE, "the next steps", log)
    slurm("scancel", job)
    assert slurm.ends(job, PATIENCE, log) == "CANCELLED"
    assert f"goes on from {run}/checkpoints/step-{saved:08d} (step {saved})" in log.read_text()
    assert list(losses(run)) == list(range(1, len(losses(run)) + 1))


HANGS = """import pathlib, sys, time
from titans_pretrain.cli import main
from titans_pretrain.training.trainer import Trainer
left, step = pathlib.Path({left!r}), Trainer.train_step
def train_step(trainer):
    if trainer.step == 3 and (n := int(left.read_text())):
        left.write_text(str(n - 1))
        time.sleep(3600)
    return step(trainer)
if sys.argv[1] == "train" and __import__("os").environ["RANK"] == "1":
    Trainer.train_step = train_step
sys.exit(main(sys.argv[1:]))"""


@pytest.mark.parametrize("hangs", [1, 9])
def test_a_job_that_hangs_goes_back_but_not_for_ever(slurm, data, uninterrupted, tmp_path, hangs):
    """Rank 1 sleeps at its fourth step, as often as a file says."""
    run, program, left = tmp_path / "run", tmp_path / "titans-pretrain", tmp_path / "left"
    left.write_text(str(hangs))
    program.write_text(f"#!{sys.executable}\n{HANGS.format(left=str(left))}\n")
    program.chmod(0o755)
    with mock.patch.dict(slurm.env, PATH=f"{tmp_path}:{slurm.env['PATH']}"):
        job, log = submit(slurm, data, run, f"train.steps={STEPS}", "parallel.hang_minutes=0.2")
    state = slurm.ends(job, 2 * PATIENCE, log)
    if hangs == 1:
        assert state == "COMPLETED" and slurm.job(job)["Restarts"] == "1", log.read_text()
        assert "hung behind the start, 1 of at most 3 times" in log.read_text() and losses(run) == uninterrupted
    else:
        assert state == "FAILED" and slurm.job(job)["ExitCode"] == "86:0", log.read_text()
        assert slurm.job(job)["Restarts"] == "2" and left.read_text() == str(hangs - 3)
        assert "error: hung behind the start 3 times" in log.read_text()
        assert len(re.findall(r"rank 1 is behind, at step 4 in run \(.*, calling train_step\)", log.read_text())) >= 3


def test_a_job_that_its_user_cancels_saves_and_stays_cancelled(slurm, data, tmp_path):
    run = tmp_path / "run"
    job, log = submit(slurm, data, run, FOREVER, options=())
    slurm.wait(lambda: len(losses(run)) > 1, PATIENCE, "the first steps", log)
    slurm("scancel", job)
    assert slurm.ends(job, PATIENCE, log) == "CANCELLED"
    time.sleep(8)  # longer than a requeued job waits
    assert slurm.job(job)["JobState"] == "CANCELLED" and slurm.job(job)["Restarts"] == "0"
    assert (run / "checkpoints/latest").exists() and "stopped by" in log.read_text()
    assert titans(slurm, "status", run).splitlines()[1].startswith(f"job {job} CANCELLED")


def test_the_chain_ends_with_a_model_that_transformers_loads(slurm, corpus, tmp_path):
    """Interrupted in the middle: what waits for the training waits until that has really ended."""
    run, out = tmp_path / "run", tmp_path / "exported"
    options = ["--parts", "2", "--train", "--gpus-per-node=0", "--all", f"--chdir={tmp_path}"]
    arguments = [corpus, "byte", tmp_path / "data", "tiny", run, out, f"train.steps={STEPS}", *TRAIN]
    lines = slurm(TEMPLATES / "chain.sh", *options, *arguments).splitlines()
    assert [line.split()[0] for line in lines] == ["tokenize", "merge", "pretrain", "export"]
    train, export = (line.split()[1] for line in lines[2:])
    slurm.wait(lambda: len(losses(run)) > 1, PATIENCE, "the first steps")
    slurm("scancel", "--signal=USR1", "--batch", train)
    log = tmp_path / f"titans-export-{export}.out"
    assert slurm.ends(export, 2 * PATIENCE, log) == "COMPLETED"
    assert slurm.job(train)["Restarts"] == "1" and slurm.job(train)["JobState"] == "COMPLETED"
    assert list(losses(run)) == list(range(1, STEPS + 1))
    assert (run / f"jobs/{train}.log").samefile(tmp_path / f"titans-pretrain-{train}.out")

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    tokens = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)("word1", return_tensors="pt")
    assert model(**tokens).logits.isfinite().all()
    assert json.loads((out / "config.json").read_text())["model_type"] == "titans"

    options = ["--parsable", "--gpus-per-node=0", f"--output={tmp_path}/eval"]
    template, arguments = TEMPLATES / "eval.sbatch", [run, "--batches", "2", "--split", "train"]
    found = slurm("sbatch", *options, template, *arguments, TITANS_SLURM=str(TEMPLATES)).strip()
    assert slurm.ends(found, PATIENCE, tmp_path / "eval") == "COMPLETED"
    assert "train loss" in (tmp_path / "eval").read_text()


def test_a_chain_whose_first_job_fails_is_cancelled(slurm, tmp_path):
    arguments = [tmp_path / "nothing", "byte", tmp_path / "data", "tiny", tmp_path / "run", tmp_path / "out"]
    lines = slurm(
        TEMPLATES / "chain.sh", "--all", f"--chdir={tmp_path}", "--train", "--gpus-per-node=0", *arguments
    ).splitlines()
    states = [slurm.ends(line.split()[1], PATIENCE) for line in lines]
    assert states == ["FAILED", "CANCELLED", "CANCELLED"]
