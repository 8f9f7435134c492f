"""Where a run stands, in three lines; without torch."""

import json
import math
import os
import time
from pathlib import Path

from titans_pretrain.commands.jobs import job_state, jobs_folder, last_words, newest_job
from titans_pretrain.config import TrainConfig, load_run_config
from titans_pretrain.training.events import read_events
from titans_pretrain.training.loggers import read_metrics
from titans_pretrain.training.progress import format_seconds

RECENT = 20  # steps that the loss and the speed are means of


def status(run_dir: str) -> str:
    """Progress; the job or the process that trains; the newest checkpoint and the last event. Raises ValueError for a folder that
    is no run."""
    run = Path(run_dir)
    folder = next((f for f in (run, jobs_folder(run)) if (f / "config.yaml").is_file()), None)
    if folder is None:
        raise ValueError(f"{run_dir} is not the folder of a run, started or submitted: it holds no config.yaml")
    lines = read_metrics(run / "metrics.jsonl")
    job = newest_job(run)
    return "\n".join(
        [
            _progress(lines, load_run_config(folder).train),
            _who(run, job),
            f"{_checkpoint(run)}; {_event(run, job, lines)}",
        ]
    )


def _progress(lines: list[dict], train: TrainConfig) -> str:
    steps, rows = train.steps, train.rows_until
    recent = [line for line in lines if math.isfinite(line.get("loss", math.nan))][
        -RECENT:
    ]  # not those of skipped steps
    if not recent:
        return f"no step yet of {steps:,}"
    first, last = recent[0], recent[-1]
    speed = sum(line["tokens_per_second"] for line in recent) / len(recent)
    if last["step"] >= steps:
        time_left = "done"
    elif len(recent) == 1 or not speed:
        time_left = f"{steps - last['step']:,} steps left"
    else:
        per_row = (last["tokens"] - first["tokens"]) / (rows(last["step"]) - rows(first["step"])) / speed
        time_left = f"{format_seconds((rows(steps) - rows(last['step'])) * per_row)} left"
    loss = sum(line["loss"] for line in recent) / len(recent)
    return f"step {last['step']:,}/{steps:,}, loss {loss:.4f}, {speed:,.0f} tokens/s, {time_left}"


def _who(run: Path, job: str | None) -> str:
    try:
        owner = json.loads((run / "lock").read_text())
        trains = f"process {owner['pid']} on {owner['host']} trains, or was killed"
    except (OSError, ValueError, KeyError, TypeError):
        trains = "nobody trains"
    if job is None:
        return trains
    state = job_state(job)
    return f"job {job} {state.told}" if state else f"job {job}, of which Slurm knows nothing here; {trains}"


def _checkpoint(run: Path) -> str:
    folder = run / "checkpoints"
    try:
        name = (folder / "latest").read_text().strip()
        age = format_seconds(max(0.0, time.time() - os.stat(folder / name).st_mtime))
    except OSError:
        return "no checkpoint yet"
    copied = [event for event in read_events(run) if event["event"] == "copied"]
    return f"newest checkpoint {name}, {age} ago" + (
        f" (step {copied[-1]['step']:,} is in the store)" if copied else ""
    )


def _event(run: Path, job: str | None, lines: list[dict]) -> str:
    if job and (words := last_words(run, job)):
        return words
    validations = [line for line in lines if "validation_loss" in line]
    if validations:
        return f"validation loss {validations[-1]['validation_loss']:.4f} at step {validations[-1]['step']:,}"
    return "nothing else happened yet"
