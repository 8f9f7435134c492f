"""The sbatch templates with stand-ins for Slurm's and this package's commands that write down how they were called. What a real
Slurm makes of them is in tests/slurm."""

import os
import subprocess
from pathlib import Path

import pytest

TEMPLATES = Path(__file__).parents[2] / "slurm"
JOB = {
    "SLURM_JOB_ID": "70007",
    "SLURM_NNODES": "2",
    "SLURM_CPUS_PER_TASK": "8",
    "SLURM_SUBMIT_DIR": str(TEMPLATES.parent),
}

# Options end at the command, which runs once per task, all of them alike: the step's exit code is the highest of theirs.
SRUN = """tasks=4
while [[ $1 == --* ]]; do
    if [[ $1 == --ntasks=* ]]; then tasks=${1#*=}; fi
    shift
done
for ((task = 0; task < tasks; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 "$@" || code=$?
done
exit ${code:-0}"""
TITANS = """if [ "$1" = check-node ]; then
    mkdir -p "$RUN/jobs/70007" && echo "$RUN"
    exit "${UNFIT:-0}"
fi
if [ "$1" = train ]; then
    echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, $MASTER_ADDR:$MASTER_PORT" >> "$CALLS"
    ignored=0x$(sed -n "s/SigIgn:\t//p" /proc/$$/status)
    [ $((ignored & 0x200)) -eq 0 ] || echo "ignores USR1" >> "$CALLS"
fi
echo "says $RANK"
[ "$SAVES" != yes ] || { mkdir -p "$RUN/checkpoints" && echo step-00000001 > "$RUN/checkpoints/latest"; }
exit $CODE"""
STUBS = {
    "srun": SRUN,
    "titans-pretrain": TITANS,
    "titans-data": "",
    "scontrol": 'if [ "$1" = show ]; then echo "   StdOut=$RUN/stdout"; fi',
    "squeue": 'echo "$STATE"',
    "scancel": "",
    "sbatch": 'n=$(($(grep -c ^sbatch "$CALLS") + 100)); echo "$n;cluster"',
}


class Run:
    """A template among stand-in commands. calls(): what was called, in order; code: what `titans-pretrain` exits with."""

    def __init__(self, tmp_path, script, *arguments, env=None, code=0, state="RUNNING", saves="yes", **stubs):
        self._calls, self.folder = tmp_path / "calls", tmp_path / "run"
        for name, text in (STUBS | stubs).items():
            stub = tmp_path / name
            stub.write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{text}\n')
            stub.chmod(0o755)
        environment = os.environ | JOB | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(self._calls)}
        environment |= {"RUN": str(self.folder), "CODE": str(code), "STATE": state, "SAVES": saves} | (env or {})
        self.process = subprocess.Popen(
            ["bash", str(TEMPLATES / script), *arguments], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def calls(self, name: str = "") -> list[str]:
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [line for line in lines if line.startswith(name)]

    def ends(self) -> tuple[int, str, str]:
        """Exit code, output, errors."""
        try:
            output, errors = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode, output, errors


@pytest.mark.parametrize("code, requeued", [(0, False), (85, True), (2, False)])
def test_a_training_goes_back_into_the_queue_only_when_it_saved(tmp_path, code, requeued):
    run = Run(tmp_path, "pretrain.sbatch", "configs/tiny.yaml", "run.name=two words", code=code)
    assert run.ends()[0] == (0 if requeued else code)
    assert ("scontrol requeue 70007" in run.calls()) == requeued
    assert run.calls().count("titans-pretrain train configs/tiny.yaml run.name=two words") == 4


SILENT = TITANS.replace(  # one task does not answer, and srun kills it
    'echo "says $RANK"',
    '[ "$RANK" = 3 ] && exit 137; echo "error: no step was finished for 60 s: rank 3 did not answer" >&2',
)


@pytest.mark.parametrize(("code", "titans"), [(86, TITANS), (86, SILENT)])
def test_a_training_that_hangs_goes_back_three_times_at_most_from_one_checkpoint(tmp_path, code, titans):
    def requeued(run: Run) -> bool:
        found, output, errors = run.ends()
        told = "hung behind step-0000000" in (output if found == 0 else errors)
        assert told and found in (0, 86, 137), (found, output, errors)
        back = "scontrol requeue 70007" in run.calls()
        run._calls.unlink()
        return back

    stubs = {"code": code, "titans-pretrain": titans}
    assert [requeued(Run(tmp_path, "pretrain.sbatch", "x", **stubs)) for _ in range(3)] == [True, True, False]
    (tmp_path / "run/checkpoints/latest").write_text("step-00000002\n")
    stubs["saves"] = "no"
    assert [requeued(Run(tmp_path, "pretrain.sbatch", "x", **stubs)) for _ in range(3)] == [True, True, False]


def test_what_was_killed_before_and_after_a_hang_is_no_hang(tmp_path):
    assert Run(tmp_path, "pretrain.sbatch", "x", code=86, **{"titans-pretrain": SILENT}).ends()[0] == 0
    (tmp_path / "calls").unlink()
    run = Run(tmp_path, "pretrain.sbatch", "x", code=137)  # by the kernel, that lacks memory
    assert run.ends()[0] == 137 and "scontrol requeue 70007" not in run.calls()


def test_a_training_that_was_cancelled_stays_so(tmp_path):
    run = Run(tmp_path, "pretrain.sbatch", "configs/tiny.yaml", code=85, state="COMPLETING")
    assert run.ends()[0] == 85
    assert "scontrol requeue 70007" not in run.calls()


def test_a_training_that_cannot_be_requeued_says_so(tmp_path):
    scontrol = STUBS["scontrol"] + '\n[ "$1" != requeue ]'
    code, _, errors = Run(tmp_path, "pretrain.sbatch", "configs/tiny.yaml", code=85, scontrol=scontrol).ends()
    assert code == 85 and "error: not requeued" in errors


def test_each_task_is_told_its_rank_and_writes_a_log_of_its_own(tmp_path):
    run = Run(tmp_path, "pretrain.sbatch", "configs/tiny.yaml")
    code, output, _ = run.ends()
    host = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    assert code == 0
    assert run.calls("rank") == [f"rank {rank} of 4, local {rank % 2}, {host}:20007" for rank in range(4)]
    assert "--wait=600 " in run.calls("srun")[-1], "longer than Slurm takes to see that a node is lost"
    assert output == "says 0\n"
    assert len(run.calls("ignores USR1")) == 4, "a process that starts dies of it"
    for rank in (1, 2, 3):
        assert (run.folder / f"jobs/70007/rank-{rank}.log").read_text() == f"says {rank}\n"
    assert os.readlink(run.folder / "jobs/70007.log") == f"{run.folder}/stdout"


def test_what_the_other_tasks_failed_of_is_in_the_job_s_log(tmp_path):
    titans = TITANS.replace('echo "says $RANK"', 'echo "error: $RANK broke" >&2')
    _, output, errors = Run(tmp_path, "pretrain.sbatch", "x", code=1, **{"titans-pretrain": titans}).ends()
    assert "error: 0 broke\n" in errors and "rank-3.log:error: 3 broke\n" in output


def test_every_node_is_checked_and_none_that_is_unfit_trains(tmp_path):
    run = Run(tmp_path, "pretrain.sbatch", "x.yaml", "a=b")
    run.ends()
    assert (
        run.calls("titans-pretrain check-node") == ["titans-pretrain check-node x.yaml a=b"] * 3
    )  # the first one twice
    run._calls.unlink()
    run = Run(tmp_path, "pretrain.sbatch", "x.yaml", "a=b", env={"UNFIT": "2"})
    assert run.ends()[0] == 2
    assert len(run.calls("titans-pretrain")) == 1


@pytest.mark.parametrize(
    ("signal", "code", "saves", "requeued"),
    [
        ("USR1", 85, "yes", True),  # the time limit
        ("USR1", 85, "no", False),  # would come again for ever
        ("TERM", 85, "no", True),  # preempted as soon as it had started
        ("TERM", 143, "no", True),  # before it listened
        ("TERM", 0, "yes", False),  # just done
    ],
)
def test_a_signal_is_passed_on_until_the_step_has_ended(tmp_path, signal, code, saves, requeued):
    """It ends bash's `wait` early; the template waits on for the step and takes its exit code."""
    train = TITANS.replace(
        'echo "says $RANK"',
        """trap '' USR1
        [ "$RANK" != 0 ] || until [ "$(grep -c "^scancel" "$CALLS")" -ge 2 ]; do sleep 0.1; done""",
    )
    stubs = {"titans-pretrain": train, "sleep": "exec /bin/sleep 0.1"}
    run = Run(tmp_path, "pretrain.sbatch", "x.yaml", code=code, saves=saves, **stubs)
    while not run.calls("rank 0"):
        assert run.process.poll() is None
    subprocess.run(["kill", f"-{signal}", str(run.process.pid)], check=True)
    ended, _, errors = run.ends()
    assert ended == (0 if requeued else code)
    assert set(run.calls("scancel")) == {"scancel --signal=USR1 70007"}
    assert bool(run.calls("scontrol requeue 70007")) == requeued
    assert ("longer --time" in errors) == (code == 85 and not requeued)


@pytest.mark.parametrize("array, shard", [(None, "0/1"), (("2", "8"), "2/8")])
def test_tokenize_takes_its_part_of_the_array(tmp_path, array, shard):
    env = {"SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "4"}
    if array:
        env |= dict(zip(("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), array, strict=True))
    run = Run(tmp_path, "tokenize.sbatch", "corpus", "tok", "data", "--deduplicate", env=env)
    run.ends()
    assert run.calls("titans-data")[0] == (
        f"titans-data tokenize corpus --tokenizer tok --out data --workers 4 --shard {shard} --deduplicate"
    )


@pytest.mark.parametrize(
    ("template", "arguments", "command"),
    [
        ("merge.sbatch", ["data", "--deduplicate"], "titans-data merge data --deduplicate"),
        ("eval.sbatch", ["runs/a", "--batches", "4"], "titans-pretrain eval runs/a --batches 4"),
        (
            "export.sbatch",
            ["runs/a", "out/a", "--dtype", "bfloat16"],
            "titans-pretrain export runs/a out/a --dtype bfloat16",
        ),
    ],
)
def test_the_other_templates_run_their_command_in_the_container(tmp_path, template, arguments, command):
    site = tmp_path / "site.sh"
    site.write_text("container=(env INSIDE=1)\nsrun_options=(--mpi=none)\n")
    run = Run(tmp_path, template, *arguments, env={"SLURM_NNODES": "1", "TITANS_SITE": str(site)})
    run.ends()
    assert command in run.calls()
    assert run.calls("srun")[-1].startswith("srun --cpus-per-task=8 --mpi=none ")
    assert run.calls("srun")[-1].endswith(f" env INSIDE=1 {command}")


@pytest.mark.parametrize("parts", [1, 3])
def test_the_jobs_of_a_chain_wait_for_each_other(tmp_path, parts):
    site = tmp_path / "site.sh"
    site.write_text("export SBATCH_ACCOUNT=me")
    options = ["--parts", str(parts), "--train", "--nodes=2 --gpus-per-node=0", "--all", "--qos=low"]
    arguments = ["a corpus", "byte", "data", "tiny", "runs/a", "out", "train.steps=3"]
    sbatch = 'echo "account $SBATCH_ACCOUNT $TITANS_SLURM" >> "$CALLS"\n' + STUBS["sbatch"]
    run = Run(tmp_path, "chain.sh", *options, *arguments, env={"TITANS_SITE": str(site)}, sbatch=sbatch)
    code, output, errors = run.ends()
    assert code == 0, errors
    after, here = "--kill-on-invalid-dep=yes --qos=low", TEMPLATES
    train = f"{here}/pretrain.sbatch tiny data.path=data run.dir=runs/a train.steps=3"
    if parts == 1:
        assert run.calls("sbatch") == [
            f"sbatch --parsable --qos=low {here}/tokenize.sbatch a corpus byte data",
            f"sbatch --parsable --dependency=afterok:101 {after} --nodes=2 --gpus-per-node=0 {train}",
            f"sbatch --parsable --dependency=afterok:102 {after} {here}/export.sbatch runs/a out",
        ]
        assert output.split() == ["tokenize", "101", "pretrain", "102", "export", "103"]
    else:
        assert run.calls("sbatch")[:2] == [
            f"sbatch --parsable --qos=low --array=0-2 {here}/tokenize.sbatch a corpus byte data",
            f"sbatch --parsable --dependency=afterok:101 {after} {here}/merge.sbatch data",
        ]
        assert "--dependency=afterok:102" in run.calls("sbatch")[2]
    assert set(run.calls("account")) == {f"account me {here}"}


@pytest.mark.parametrize("script", [*sorted(p.name for p in TEMPLATES.glob("*.sbatch")), "chain.sh"])
def test_usage(tmp_path, script):
    run = Run(tmp_path, script)
    code, _, errors = run.ends()
    assert code == 2 and errors.startswith("usage: ") and not run.calls()


@pytest.mark.parametrize("options", [["--parts", "0"], ["--parts"], ["--what", "ever"]])
def test_usage_of_the_chain(tmp_path, options):
    run = Run(tmp_path, "chain.sh", *options, "1", "2", "3", "4", "5", "6")
    assert run.ends()[0] == 2 and not run.calls()


def test_submitted_from_elsewhere_it_says_what_to_do(tmp_path):
    run = Run(tmp_path, "merge.sbatch", "data", env={"SLURM_SUBMIT_DIR": str(tmp_path)})
    code, _, errors = run.ends()
    assert code == 2 and "export TITANS_SLURM=" in errors
    assert (
        Run(tmp_path, "merge.sbatch", "data", env={"SLURM_SUBMIT_DIR": "/", "TITANS_SLURM": str(TEMPLATES)}).ends()[0]
        == 0
    )
