"""Every setting that a message, a docstring or a page of the documentation names is one that there is."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from titans_pretrain.config import Config
from titans_pretrain.config.keys import all_keys
from titans_pretrain.evaluation.tasks import TASKS
from titans_pretrain.forecasting.config import ForecastConfig
from titans_pretrain.genomics.config import ClassifyConfig

ROOT = Path(__file__).parents[3]
FILES = "csv|jpg|json|jsonl|md|png|py|safetensors|sbatch|sh|yaml"
OTHERS = {  # that look like one: a property, a parameter, and the wrong name that a docstring gives as an example
    "model.document_multiple",
    "model.embed_tokens.weight",
    "train.seq_len",
}


def settings() -> set[str]:
    """All legal names of settings, those of the evaluation's tasks under the task's name; groups are names too."""
    keys = {key for schema in (Config, ForecastConfig, ClassifyConfig) for key in all_keys(schema)}
    for task, (where, _) in TASKS.items():
        module, _, name = where.rpartition(".")
        options = getattr(importlib.import_module(f"titans_pretrain.evaluation.{module}"), name).Options
        keys |= {f"{task}.{key}" for key in all_keys(options)}
    return keys | {key.rpartition(".")[0] for key in keys}


def said(path: Path) -> list[str]:
    """The texts of a file: all of it, and of Python its strings."""
    text = path.read_text()
    if path.suffix != ".py":
        return [text]
    return [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def unknown_settings(texts: list[str], legal: set[str]) -> set[str]:
    groups = "|".join(sorted({key.partition(".")[0] for key in legal} - {"", "version"}))
    named = re.compile(rf"(?<![\w./*])(?:{groups})(?:\.[a-z_0-9]+)+(?![\w(/*])")
    found = {name for text in texts for name in named.findall(text)} - OTHERS
    return {name for name in found if name not in legal and not re.search(rf"\.(?:{FILES})$", name)}


@pytest.mark.parametrize(
    "folder",
    [
        "titans_pretrain",
        "data_prep",
        "kernels",
        "benchmarks",
        "configs",
        "docs",
        "scripts",
        "slurm",
        "README.md",
        "CONTRIBUTING.md",
    ],
)
def test_a_named_setting_exists(folder):
    files = [ROOT / folder] if folder.endswith(".md") else sorted((ROOT / folder).rglob("*"))
    legal = settings()
    wrong = {
        str(f.relative_to(ROOT)): found
        for f in files
        if f.suffix in (".py", ".md", ".sbatch", ".yaml") and (found := unknown_settings(said(f), legal))
    }
    assert not wrong


def test_an_unknown_one_is_found():
    legal = settings()
    assert unknown_settings(["set train.lr and synthetic.train_lengths, see model.py"], legal) == {
        "synthetic.train_lengths"
    }
