"""The Slurm jobs of a run, and what Slurm says of them.

RUN/jobs/pretrain.sbatch, config.yaml   what `titans-pretrain submit` submitted last
RUN/jobs/123.log                        of job 123: what its script and its first task said
RUN/jobs/123/                           rank-N.log of its other tasks, and environment-NODE-RESTART.txt of its nodes
"""

from dataclasses import dataclass
from pathlib import Path

from titans_pretrain.commands.programs import output_of


@dataclass(frozen=True)
class JobState:
    name: str  # PENDING, RUNNING, COMPLETED, ..., as Slurm names it
    told: str  # the same with when and where

    @property
    def waits_or_runs(self) -> bool:
        return self.name in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED")


def jobs_folder(run: Path) -> Path:
    return run / "jobs"


def newest_job(run: Path) -> str | None:
    """The number of the run's newest job; None if no job was ever submitted for it, or started in it."""
    numbers = [int(path.name) for path in jobs_folder(run).glob("*/") if path.name.isdecimal()]
    return str(max(numbers)) if numbers else None


def job_state(job: str) -> JobState | None:
    """What the queue says of a job, or after that the accounting; None where neither knows it."""
    queued = output_of("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%M|%l|%N|%r")
    if queued and queued.strip():
        name, ran, limit, nodes, reason = queued.splitlines()[0].strip().split("|")
        if name == "PENDING":
            return JobState(name, f"PENDING ({reason})")
        return JobState(name, f"{name}{f' on {nodes}' if nodes else ''}, {ran} of {limit}")
    ended = output_of(
        "sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=State,Elapsed,ExitCode"
    )
    if ended and ended.strip():
        name, ran, code = ended.splitlines()[-1].strip().split("|")
        return JobState(name.split()[0], f"{name} after {ran}, exit code {code.partition(':')[0]}")
    return None


def last_words(run: Path, job: str) -> str | None:
    """The last line of a job's log that is not one of the training's steps."""
    try:
        with open(jobs_folder(run) / f"{job}.log", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 2**16))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("step ")), None)
