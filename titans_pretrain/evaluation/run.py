"""Runs tasks on one model, over any number of processes: each takes a share of the batches, the first one writes what came out.

OUT/TASK.jsonl    the result of every item: what was done is not done again (item_log.py)
OUT/TASK.json     the figures
OUT/TASK.md       the same as a table, beside the paper's where it has them
OUT/TASK*.png     pictures, of tasks that have some
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from titans_pretrain.checkpoint import find_checkpoint
from titans_pretrain.checkpoint.store import make_folder, write_text
from titans_pretrain.checkpoint.together import from_all, rank, world
from titans_pretrain.config import load_config, load_run_config, refuse_commands
from titans_pretrain.evaluation.item_log import ItemLog
from titans_pretrain.evaluation.model import LanguageModel, fingerprint, open_model
from titans_pretrain.evaluation.tasks import Item, Task, build_options, parse_tasks, split_overrides, task_class
from titans_pretrain.evaluation.texts import Texts
from titans_pretrain.hf.importing import is_export
from titans_pretrain.parallel.launch import launched_world, leave_processes, start_processes
from titans_pretrain.parallel.watchdog import Watchdog

WAIT_MINUTES = 7 * 24 * 60.0  # for the slowest process at a task's end; a process that is lost is noticed in seconds


def run_tasks(
    path: str,
    tasks: str,
    overrides: Sequence[str] = (),
    *,
    split: str = "validation",
    out: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> str:
    """The tables of all tasks, as Markdown; on other processes than the first an empty text.

    path: a run, checkpoint or exported folder. tasks: names, separated by commas. overrides: settings of the run's data
    (`data.path=DATA`), `train.precision`, and settings of tasks (`niah.samples=10`). out: the folder of the results; None: `evaluation` in the run,
    with a folder per checkpoint, or EXPORT-evaluation. Raises ValueError for what cannot be evaluated.
    """
    names = parse_tasks(tasks)
    if batch_size < 1:
        raise ValueError(f"--at-once must be 1 or more, got {batch_size}")
    of_run, of_tasks = split_overrides(overrides)
    if unused := sorted(of_tasks.keys() - set(names)):
        raise ValueError(f"{unused[0]}.* is set, but --tasks has only {', '.join(names)}")
    options = {name: build_options(name, of_tasks.get(name, {})) for name in names}
    for text in of_run:
        if not text.startswith(("data.", "train.precision=")):
            raise ValueError(f"{text!r} has no effect on tasks; data.*, train.precision and their own settings have")
    if is_export(path):
        config = load_config(None, of_run)
    else:
        path = str(find_checkpoint(path))
        config = load_run_config(path, of_run)
        refuse_commands(config, of_run)
    folder = Path(out) if out else default_folder(path)
    joined = _join(device)
    try:
        if rank() == 0:
            make_folder(folder)
        identity = {
            "model": from_all(fingerprint(path) if rank() == 0 else None)[0],
            "precision": config.train.precision,
        }
        with Watchdog(config.parallel.lost_after_seconds):
            model = open_model(path, device, config.train.precision)
            texts = Texts(config, split)
            tables = []
            for name in names:
                task = task_class(name)(options[name], model, texts)
                of_task = identity | {"options": dataclasses.asdict(options[name])} | task.identity()
                tables.append(run_task(name, task, model, folder, of_task, batch_size))
            return "\n".join(tables) if rank() == 0 else ""
    finally:
        if joined:
            leave_processes()


def run_task(
    name: str, task: Task, model: LanguageModel, folder: Path, identity: Mapping[str, Any], batch_size: int
) -> str:
    """Does the items that are not done yet, writes what came out, and returns the table."""
    items = task.items()
    log = ItemLog(folder, name, dict(identity))
    try:
        open_items = [item for item in items if item.key not in log.finished]
        mine = batches(open_items, batch_size)[rank() :: world()]
        with _progress(name, sum(map(len, mine)), model) as bar:
            for batch in mine:
                for item, result in zip(batch, task.run(batch), strict=True):
                    log.append(item.key, result)
                bar.update(len(batch))
        results = log.gather([item.key for item in items])
    finally:
        log.close()
    if rank():
        return ""
    figures, table = task.report(results, folder)
    write_text(folder / f"{name}.json", json.dumps({"identity": identity, "figures": figures}, indent=1) + "\n")
    write_text(folder / f"{name}.md", table)
    return table


@contextlib.contextmanager
def _progress(name: str, items: int, model: LanguageModel):
    """A bar over items, which also moves while a long one is read."""
    from tqdm import tqdm

    seconds = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(total=items, desc=name, unit="item", mininterval=seconds, disable=rank() > 0 or not items) as bar:

        def told(tokens: int) -> None:
            bar.set_postfix_str(f"{tokens:,} tokens read", refresh=False)
            bar.update(0)

        model.told = told
        yield bar


def batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Items of one length together, at most `size`; the longest first, so that processes end at about the same time."""
    ordered = sorted(items, key=lambda item: -item.tokens)
    groups = [list(group) for _, group in groupby(ordered, key=lambda item: item.tokens)]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def default_folder(path: str) -> Path:
    """path: a checkpoint or exported folder."""
    if is_export(path):
        folder = Path(path).resolve()
        return folder.with_name(f"{folder.name}-evaluation")  # in it, the next export would take it for someone else's
    checkpoint = Path(path).resolve()
    return checkpoint.parents[1] / "evaluation" / checkpoint.name


def _join(device: str) -> bool:
    """Joins this process to the others of torchrun, by gloo: nothing but results goes between them. Whether it was not before."""
    if launched_world() == 1 or torch.distributed.is_initialized():
        return False
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    start_processes(torch.device("cpu"), WAIT_MINUTES)
    return True
