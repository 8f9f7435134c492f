"""submit, status and check-node, with stand-ins for Slurm's commands."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from titans_pretrain import cli
from titans_pretrain.commands import check_node as node
from titans_pretrain.commands.jobs import job_state
from titans_pretrain.config import load_config

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """programs(name=script, ...): puts stand-ins in the place of programs; None: there is no such program."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.setattr(shutil, "which", lambda name: str(folder / name) if (folder / name).exists() else None)
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "TITANS"))]:
        monkeypatch.delenv(name)

    def put(**scripts: str | None) -> Path:
        for name, script in scripts.items():
            path = folder / name.replace("_", "-")
            path.write_text(f"#!/bin/bash\n{'exit 127' if script is None else script}\n")
            path.chmod(0o755)
        return folder

    put(squeue=None, sacct=None, nvidia_smi=None)
    return put


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder, with a blank and a percent sign in its name."""
    folder = tmp_path / "my 5% work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


SUBMIT = ["submit", "tiny", "data.path=data", "run.dir=runs/a"]
SBATCH = 'printf "%s\\n" "$@" > "$0.arguments"; env > "$0.environment"; echo "7;cluster"'


def test_submit_writes_what_it_submits(programs, here, capsys, monkeypatch):
    folder = programs(sbatch=SBATCH)
    (here / "site.sh").write_text("export SBATCH_PARTITION=gpus\necho noise >&2\nGREETING=hello")
    monkeypatch.setenv("TITANS_SITE", "site.sh")
    options = ["--nodes", "2", "--gpus-per-node", "4", "--time", "1-0", "--account", "us", "--sbatch=--mem-per-cpu=1G"]
    assert cli.main([*SUBMIT, *options, "train.global_batch=16"]) == 0
    assert capsys.readouterr().out == (
        "job 7; its log is runs/a/jobs/7.log, and `titans-pretrain status runs/a` says where it stands\n"
    )
    jobs = here / "runs/a/jobs"
    given = ["--job-name=tiny", f"--chdir={here}", f"--output={tmp(jobs)}/%j.log", "--nodes=2", "--ntasks-per-node=4"]
    given += ["--gpus-per-node=4", "--time=1-0", "--account=us", "--mem-per-cpu=1G"]
    assert (folder / "sbatch.arguments").read_text().splitlines() == [
        "--parsable", *given, "runs/a/jobs/pretrain.sbatch",
    ]  # fmt: skip
    assert "SBATCH_PARTITION=gpus\n" in (folder / "sbatch.environment").read_text()
    assert load_config(jobs / "config.yaml").train.global_batch == 16
    assert (jobs / "7").is_dir()
    script = (jobs / "pretrain.sbatch").read_text()
    lines = [
        line.removeprefix("#SBATCH ").replace("'", "") for line in script.splitlines() if line.startswith("#SBATCH")
    ]
    assert [line for line in lines if line in given] == given
    assert len({line.partition("=")[0] for line in lines}) == len(lines), "no option twice"
    assert f"set -- '{jobs}/config.yaml'\n" in script and "\nGREETING=hello\n" in script
    assert "titans_slurm" not in script and "check_nodes()" in script


def tmp(path: Path) -> str:
    """As an option of sbatch has it, where % begins a pattern."""
    return str(path).replace("%", "%%")


def test_submit_shows_the_script_without_a_trace(here, capsys):
    assert cli.main([*SUBMIT, "--dry-run", "train.device=cpu", "--nodes", "2"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n") and script.endswith("\nexit $code\n\n")
    for option in ("--gpus-per-node=0", "--ntasks-per-node=1", "--nodes=2", "--time=24:00:00", "--signal=B:USR1@300"):
        assert f"#SBATCH {option}\n" in script
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--nodes", "3"],
            "train.global_batch=4 must be a multiple of train.micro_batch=2 * 3 data-parallel processes",
        ),
        (["--nodes", "0"], "must be 1 or more"),
        (["--gpus-per-node", "2", "--tasks-per-node", "4"], "each GPU has one process"),
        (["data.path=null"], "data.path is not set"),
        (["train.lr=fast"], "train.lr = 'fast': must be a number"),
    ],
)
def test_submit_refuses_what_no_job_could_start_with(programs, here, capsys, arguments, told):
    programs(sbatch=SBATCH)
    assert cli.main([*SUBMIT, *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not list(here.iterdir())


def test_submit_without_slurm(programs, here, capsys):
    assert cli.main(SUBMIT) == 2
    assert "there is no sbatch on this machine" in capsys.readouterr().err


def test_submit_says_why_sbatch_refused(programs, here, capsys):
    programs(sbatch='echo "sbatch: error: invalid partition specified: x" >&2; exit 1')
    assert cli.main(SUBMIT) == 2
    assert "invalid partition specified: x" in capsys.readouterr().err


def test_submit_refuses_a_run_whose_job_waits_or_runs(programs, here, capsys):
    programs(sbatch=SBATCH, squeue='echo "PENDING|0:00|1:00||Priority"')
    assert cli.main(SUBMIT) == 0
    assert cli.main(SUBMIT) == 2
    assert "job 7 of runs/a is PENDING (Priority); end it first: scancel 7" in capsys.readouterr().err
    programs(squeue='echo "COMPLETED|0:00|1:00|n1|None"')
    assert cli.main(SUBMIT) == 0


def test_submit_names_a_site_file_that_is_not_there(programs, here, capsys, monkeypatch):
    monkeypatch.setenv("TITANS_SITE", "gone.sh")
    assert cli.main([*SUBMIT, "--dry-run"]) == 2
    assert "TITANS_SITE=gone.sh: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("squeue", "sacct", "told"),
    [
        ("echo 'RUNNING|1:02|4:00:00|n[1-2]|None'", None, "RUNNING on n[1-2], 1:02 of 4:00:00"),
        ("echo 'PENDING|0:00|4:00:00||BeginTime'", None, "PENDING (BeginTime)"),
        ("exit 1", "echo 'CANCELLED by 0|00:01:00|0:0'", "CANCELLED by 0 after 00:01:00, exit code 0"),
        ("true", "echo 'FAILED|00:01:00|2:0'", "FAILED after 00:01:00, exit code 2"),
        (None, None, None),
    ],
)
def test_the_state_of_a_job(programs, squeue, sacct, told):
    programs(squeue=squeue, sacct=sacct)
    state = job_state("7")
    assert (state and state.told) == told


def a_run(folder: Path, steps: int, of: int = 100) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(f"train: {{steps: {of}}}\nrun: {{name: a, dir: a}}\n")
    lines = [
        {"step": i, "loss": 5.0 - i / 10, "tokens": 300 * i, "tokens_per_second": 150.0} for i in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def status_of(run: Path, capsys) -> list[str]:
    assert cli.main(["status", str(run)]) == 0
    return capsys.readouterr().out.splitlines()


def test_status_of_a_run_without_slurm(programs, tmp_path, capsys):
    run = a_run(tmp_path / "a", 40)
    # 60 steps of 300 tokens at 150 tokens/s; the last 20 losses are 2.9 ... 1.0
    assert status_of(run, capsys) == [
        "step 40/100, loss 1.9500, 150 tokens/s, 2:00 left",
        "nobody trains",
        "no checkpoint yet; nothing else happened yet",
    ]
    (run / "lock").write_text(json.dumps({"host": "n1", "pid": 12}))
    (run / "checkpoints/step-00000030").mkdir(parents=True)
    (run / "checkpoints/latest").write_text("step-00000030\n")
    os.utime(run / "checkpoints/step-00000030", (0, os.stat(run).st_mtime - 100))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 40, "validation_loss": 2.5}) + "\n")
    lines = status_of(run, capsys)
    assert lines[1] == "process 12 on n1 trains, or was killed"
    assert lines[2].startswith("newest checkpoint step-00000030, 1:4")
    assert lines[2].endswith(" ago; validation loss 2.5000 at step 40")


def test_the_time_left_counts_the_rows_of_steps_to_come(programs, tmp_path, capsys):
    """60 steps of twice the rows, hence 600 tokens, at 150 tokens/s."""
    run = a_run(tmp_path / "a", 40)
    warm = "steps: 100, micro_batch: 1, global_batch: 8, batch_warmup: [[0, 4], [40, 8]]"
    (run / "config.yaml").write_text(f"train: {{{warm}}}\nrun: {{name: a, dir: a}}\n")
    assert status_of(run, capsys)[0] == "step 40/100, loss 1.9500, 150 tokens/s, 4:00 left"


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (0, "no step yet of 100"),
        (1, "step 1/100, loss 4.9000, 150 tokens/s, 99 steps left"),
        (100, "step 100/100, loss -4.0500, 150 tokens/s, done"),
    ],
)
def test_status_at_the_start_and_the_end(programs, tmp_path, capsys, steps, told):
    assert status_of(a_run(tmp_path / "a", steps), capsys)[0] == told


def test_status_of_a_job(programs, tmp_path, capsys):
    programs(squeue='[[ "$*" != *--jobs=70* ]] || echo "RUNNING|1:02|4:00:00|n1|None"')
    run = tmp_path / "a"
    (run / "jobs/9").mkdir(parents=True)
    shutil.move(a_run(run, 0) / "config.yaml", run / "jobs/config.yaml")  # submitted, and not yet started
    assert status_of(run, capsys)[1] == "job 9, of which Slurm knows nothing here; nobody trains"
    (run / "jobs/70").mkdir()
    (run / "jobs/70.log").write_text("goes on\nslow disk\nstep 10/100  loss 3\nstep 15/100  loss 3\n\n")
    assert status_of(run, capsys)[1:] == ["job 70 RUNNING on n1, 1:02 of 4:00:00", "no checkpoint yet; slow disk"]


def test_status_of_no_run(tmp_path, capsys):
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def check(*arguments: object) -> int:
    return cli.main(["check-node", *map(str, arguments)])


def test_a_fit_node_prints_the_folder_and_leaves_nothing(programs, here, capsys):
    assert check("tiny", "run.dir=runs/a") == 0
    assert capsys.readouterr().out == f"{here}/runs/a\n"
    assert [path.name for path in here.rglob("*")] == ["runs", "a"]
    assert check("--folder", "data") == 0 and check() == 0
    assert capsys.readouterr().out == f"{here}/data\n{here}\n"


def test_in_a_job_the_environment_is_written_down(programs, here, monkeypatch):
    programs(nvidia_smi='[ "$1" = --list-gpus ] && echo "GPU 0: H100" || echo "H100, 570.1, 80000 MiB, GPU-1"')
    job = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n3", "SLURM_RESTART_COUNT": "2", "SLURM_GPUS_ON_NODE": "1"}
    for name, value in (
        job | {"NCCL_DEBUG": "INFO", "HF_TOKEN": "hf-123", "SLURM_JWT": "abc", "HOME_PAGE": "x"}
    ).items():
        monkeypatch.setenv(name, value)
    assert check("tiny", "run.dir=run") == 0
    record = (here / "run/jobs/7/environment-n3-2.txt").read_text()
    for line in ("\nNCCL_DEBUG=INFO\n", "\nSLURM_JOB_ID=7\n", "\ntorch==", "\nH100, 570.1", "node n3 (", "\nsources "):
        assert line in record
    for secret in ("hf-123", "abc", "HOME_PAGE"):
        assert secret not in record


@pytest.mark.parametrize(
    ("asked", "smi", "told"),
    [
        ("2", None, "the job asked for 2 GPUs a node, and nvidia-smi does not answer"),
        ("2", "echo 'GPU 0: H100'", "the job asked for 2 GPUs a node, and nvidia-smi sees 1"),
        ("1", "echo 'No devices were found'", "and nvidia-smi sees 0"),
        ("1", "echo 'GPU 0: H100'; echo '  MIG'; echo 'GPU 1: H100'", None),
        ("0", None, None),
    ],
)
def test_a_node_without_the_gpus_that_were_asked_for(programs, here, capsys, monkeypatch, asked, smi, told):
    programs(nvidia_smi=smi)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", asked)
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    assert check("tiny") == (2 if told else 0)
    assert (f"error: node n3: {told}" if told and told[0] == "t" else told or "") in capsys.readouterr().err
    assert check("tiny", "train.device=cpu") == 0


def test_a_full_disk(programs, here, capsys, monkeypatch):
    free = {"/": 50 * 2**20}
    monkeypatch.setattr(node.tempfile, "gettempdir", lambda: "/")
    monkeypatch.setattr(node.shutil, "disk_usage", lambda path: Usage(0, 0, free.get(str(path), 2**30)))
    assert check("tiny", "run.dir=run") == 2
    assert "0.0 GiB are free in /, 0.1 are needed" in capsys.readouterr().err
    free["/"] = 2**30
    assert check("tiny", "run.dir=run") == 0
    newest = here / "run/checkpoints/step-00000002"
    (newest / "weights").mkdir(parents=True)
    with open(newest / "weights/large", "wb") as file:
        file.truncate(2 * 2**30)
    assert check("tiny", "run.dir=run") == 2
    assert f"1.0 GiB are free in {here}/run, 2.2 are needed" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(programs, here, capsys):
    (here / "run").touch()
    assert check("tiny", "run.dir=run/a") == 2
    assert f"cannot write in {here}/run/a: Not a directory" in capsys.readouterr().err
