"""The loss of a checkpoint on held-out text, or what a model does in the tasks of titans_pretrain/evaluation/."""

import dataclasses
from collections.abc import Sequence

import torch

from titans_pretrain.checkpoint import find_checkpoint, find_tokenizer, load_weights
from titans_pretrain.commands.table import format_table
from titans_pretrain.commands.train import check_data_is_set
from titans_pretrain.config import load_run_config, refuse_commands
from titans_pretrain.data import build_reader
from titans_pretrain.data.tokenizer import read_tokenizer_entry
from titans_pretrain.evaluation.run import run_tasks as evaluate_tasks
from titans_pretrain.evaluation.tasks import TASKS, build_options
from titans_pretrain.models import build_model
from titans_pretrain.training.engine import SingleEngine, pick_device
from titans_pretrain.training.validation import Validator

__all__ = ["evaluate", "evaluate_tasks", "list_tasks"]


def evaluate(path: str, overrides: Sequence[str] = (), split: str = "validation", batches: int | None = None) -> str:
    """A short table: loss (nats per token), perplexity and tokens of the first `batches` micro-batches of a split.

    path: a run or checkpoint folder; overrides: settings that differ from the run's, such as data.path.
    """
    checkpoint = find_checkpoint(path)
    config = load_run_config(checkpoint, overrides)
    check_data_is_set(config)
    refuse_commands(config, overrides)
    if batches is not None and batches < 1:
        raise ValueError(f"--batches must be 1 or more, got {batches}")
    device = pick_device(config.train.device)
    reader = build_reader(config, split=split, epochs=1)
    trained, found = read_tokenizer_entry(find_tokenizer(path)), reader.tokenizer
    if found != trained:
        raise ValueError(
            f"{checkpoint} was trained on tokens of {trained}, the data has those of {found}; give data of the former"
        )
    with torch.device("meta"):
        model = build_model(config.model)
    load_weights(checkpoint, model.to_empty(device=device))
    found = Validator(reader, batches or config.train.eval_batches).run(SingleEngine(config, model, device))
    return format_table(
        {
            "checkpoint": checkpoint,
            f"{split} loss": f"{found['validation_loss']:.4f}",
            "perplexity": f"{found['validation_perplexity']:.2f}",
            "tokens": f"{found['validation_tokens']:,}",
        }
    )


def list_tasks() -> str:
    """Every task with its settings, their defaults and meanings."""
    lines = []
    for name, (_, meaning) in TASKS.items():
        defaults = build_options(name, {})
        rows = {
            f"  {name}.{f.name}={_told(getattr(defaults, f.name))}": f.metadata["meaning"]
            for f in dataclasses.fields(defaults)
        }
        lines += [f"{name}: {meaning}", format_table(rows), ""]
    return "\n".join(lines).rstrip()


def _told(value) -> str:
    """A default as it would be given."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
