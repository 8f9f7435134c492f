"""The tasks by name, and what each has to offer."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from titans_pretrain.config.check import check_fields, did_you_mean
from titans_pretrain.config.load import parse_overrides

# name -> the class in titans_pretrain/evaluation/, and what it measures
TASKS = {
    "perplexity": ("perplexity.Perplexity", "loss by position, with the state carried and with it reset"),
    "niah": ("niah.Niah", "a number or uuid found again in a haystack of 2K to 2M tokens (RULER's S-NIAH)"),
    "synthetic": (
        "synthetic.Synthetic",
        "recall (mqar, needle) and state tracking (parity, s5), of models trained on them",
    ),
    "babilong": (
        "babilong.Babilong",
        "facts of a story scattered in other text, 0K to 10M tokens (BABILong qa1 to qa5)",
    ),
    "harness": ("harness.Harness", "language modelling and common sense, zero-shot, by lm-eval's tasks"),
}


@dataclass(frozen=True)
class Item:
    """One thing to do. key: its name in the results. tokens: its length; items of one length are done as a batch."""

    key: str
    tokens: int


class Task(Protocol):
    """Made of (options, model, texts). The same options, model and texts give the same items on every process."""

    Options: type  # a dataclass of JSON-able fields, its checks in it

    def identity(self) -> dict:
        """What decides the results beside options and weights: fingerprints of what is read."""

    def items(self) -> list[Item]: ...

    def run(self, items: Sequence[Item]) -> list[dict]:
        """A JSON-able result for each item of a batch: all of one length."""

    def report(self, results: Mapping[str, dict], folder: Path) -> tuple[dict, str]:
        """results: of every item by its key. JSON-able figures, and Markdown that shows them; pictures go into the folder."""


def task_class(name: str) -> type:
    module, _, cls = TASKS[name][0].rpartition(".")
    return getattr(importlib.import_module(f"titans_pretrain.evaluation.{module}"), cls)


def parse_tasks(text: str) -> list[str]:
    """The names in "a,b". Raises ValueError for one that there is not."""
    names = list(dict.fromkeys(filter(None, (name.strip() for name in text.split(",")))))
    for name in names:
        if name not in TASKS:
            raise ValueError(f"--tasks {name}: there are {', '.join(TASKS)}{did_you_mean(name, TASKS)}")
    if not names:
        raise ValueError(f"--tasks is empty; there are {', '.join(TASKS)}")
    return names


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The overrides that are the run's, and those of tasks (`niah.samples=10`) by task and key."""
    of_run: list[str] = []
    of_tasks: dict[str, dict[str, Any]] = {}
    for text, parsed in zip(overrides, parse_overrides(overrides), strict=True):
        name = next(iter(parsed))
        if name not in TASKS:
            of_run.append(text)
        elif isinstance(parsed[name], dict):
            of_tasks.setdefault(name, {}).update(parsed[name])
        else:
            raise ValueError(f"{text!r} sets no key; give {name}.KEY=VALUE")
    return of_run, of_tasks


def build_options(name: str, values: Mapping[str, Any]):
    """A task's options. Raises ValueError naming the key that is wrong."""
    options = task_class(name).Options
    legal = options.__dataclass_fields__
    for key in values:
        if key not in legal:
            raise ValueError(f"{name}.{key}: there are {', '.join(legal)}{did_you_mean(key, legal)}")
    return options(**values)


def check_options(options, name: str) -> None:
    """For __post_init__ of Options: the type of every field."""
    check_fields(options, name)


def parse_lengths(key: str, lengths: Sequence[int | str]) -> list[int]:
    """Numbers of tokens: 4096, "4K" and "2M" (powers of two). Raises ValueError naming the key."""
    found = []
    for length in lengths:
        text = str(length).upper()
        scale = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        digits = text if scale == 1 else text[:-1]
        if isinstance(length, bool) or not digits.isdecimal():
            raise ValueError(f"{key} has {length!r}; a length is a number of tokens such as 4096, 4K or 2M")
        found.append(int(digits) * scale)
    return found


def format_length(tokens: int) -> str:
    """4096 -> 4K"""
    for letter, scale in (("M", 2**20), ("K", 2**10)):
        if tokens and tokens % scale == 0:
            return f"{tokens // scale}{letter}"
    return str(tokens)
