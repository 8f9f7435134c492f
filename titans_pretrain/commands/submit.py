"""From a config to a job in Slurm's queue: fills the template slurm/pretrain.sbatch and submits it."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from titans_pretrain.commands.jobs import job_state, jobs_folder, newest_job
from titans_pretrain.config import Config, save_config
from titans_pretrain.config.shipped import SLURM


def resources(config: Config, nodes: int, gpus: int | None, tasks: int | None) -> dict[str, str]:
    """Options of sbatch for `gpus` processes on each of `nodes`, with a GPU each (None: 1, or 0 where the config trains on a CPU);
    without GPUs for `tasks` processes (None: 1). Raises ValueError for numbers, a layout or data that no job could start with."""
    from titans_pretrain.commands.train import check_data_is_set
    from titans_pretrain.parallel.layout import check_layout

    check_data_is_set(config)
    if gpus is None:
        gpus = 0 if config.train.device == "cpu" else 1
    if gpus < 0 or nodes < 1 or (tasks is not None and tasks < 1):
        raise ValueError("--nodes and --tasks-per-node must be 1 or more, --gpus-per-node 0 or more")
    if gpus and tasks not in (None, gpus):
        raise ValueError(f"--tasks-per-node={tasks} does not go with --gpus-per-node={gpus}: each GPU has one process")
    tasks = gpus or tasks or 1
    check_layout(config, nodes * tasks)
    return {"nodes": f"{nodes}", "ntasks-per-node": f"{tasks}", "gpus-per-node": f"{gpus}"}


def submit(config: Config, options: Mapping[str, str], further: Sequence[str] = ()) -> str:
    """Writes RUN/jobs/pretrain.sbatch with the config as it is now, submits it, and says which job it is and where its log is.

    options: {"nodes": "2", ...} of sbatch over those of the template; further: options of sbatch as they are. Raises ValueError
    where there is no sbatch, where it refuses, and while a job of this run waits or runs."""
    run = Path(config.run.dir)
    script = job_script(config, options, further)
    if shutil.which("sbatch") is None:
        raise ValueError("there is no sbatch on this machine; submit where Slurm is, or see the script with --dry-run")
    if (earlier := newest_job(run)) and (state := job_state(earlier)) and state.waits_or_runs:
        raise ValueError(f"job {earlier} of {run} is {state.told}; end it first: scancel {earlier}")
    folder = jobs_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    path = folder / "pretrain.sbatch"
    path.write_text(script)
    # Once more on the command line, where options go over those of the variables that site.sh may set.
    words = ["sbatch", "--parsable", *_lines(config, options), *further, str(path)]
    done = subprocess.run(
        ["bash", "-c", 'source "$0" && exec "$@"', str(_site()), *words], capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"sbatch refused {path}: {' '.join(done.stderr.split())}")
    job = done.stdout.split()[-1].partition(";")[0]
    (folder / job).mkdir(exist_ok=True)
    return f"job {job}; its log is {folder / job}.log, and `titans-pretrain status {shlex.quote(str(run))}` says where it stands"


def job_script(config: Config, options: Mapping[str, str], further: Sequence[str] = ()) -> str:
    """The template with its options and arguments filled in and the files that it reads put in their place, so that it can be
    submitted from anywhere, and goes on as it was when it is requeued."""
    given = [*_lines(config, options), *further]
    names = {option.partition("=")[0] for option in given}
    lines = []
    for line in _template("pretrain.sbatch"):
        if line.startswith("#SBATCH ") and line.removeprefix("#SBATCH ").partition("=")[0] in names:
            continue
        if line.startswith("if [ $# -lt"):  # the first line after the options
            lines += [f"#SBATCH {shlex.quote(option)}" for option in given]
            lines += [f"set -- {shlex.quote(str(jobs_folder(Path(config.run.dir)).absolute() / 'config.yaml'))}", line]
        elif line.startswith('source "$titans_slurm/job.sh"'):
            lines += _common()
        elif not line.startswith("titans_slurm="):
            lines.append(line)
    return "\n".join(lines) + "\n"


def _lines(config: Config, options: Mapping[str, str]) -> list[str]:
    """Options of sbatch, each as one word."""
    log = str(jobs_folder(Path(config.run.dir)).absolute()).replace("%", "%%") + "/%j.log"
    own = {"job-name": config.run.name or "titans-pretrain", "chdir": os.getcwd(), "output": log}
    return [f"--{name}={value}" for name, value in (own | dict(options)).items()]


def _template(name: str) -> list[str]:
    return (SLURM / name).read_text().splitlines()


def _common() -> list[str]:
    """job.sh with site.sh in it."""
    lines = []
    for line in _template("job.sh"):
        lines += _site().read_text().splitlines() if line.startswith("source ") else [line]
    return lines


def _site() -> Path:
    path = Path(os.environ.get("TITANS_SITE") or SLURM / "site.sh")
    if not path.is_file():
        raise ValueError(f"TITANS_SITE={path}: there is no such file")
    return path
