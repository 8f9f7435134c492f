"""What a run reached, in a few lines."""

import math
from pathlib import Path
from statistics import median

from titans_pretrain.commands.foreign import refuse_commands
from titans_pretrain.commands.table import format_table
from titans_pretrain.config import Config, load_config
from titans_pretrain.training.loggers import read_metrics
from titans_pretrain.training.plot import plot_loss


def report(run_dir: str) -> str:
    """A table of a run folder's metrics; draws loss.png anew. Raises ValueError for a folder that is no run."""
    run = Path(run_dir)
    if not (run / "config.yaml").is_file() or not (run / "metrics.jsonl").is_file():
        raise ValueError(f"{run_dir} is not a run folder: it needs config.yaml and metrics.jsonl")
    config, lines = load_config(run / "config.yaml"), read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise ValueError(f"{run_dir} has not finished a step yet")
    last = steps[-1]
    recent = steps[-max(1, len(steps) // 20) :]
    rows: dict[str, object] = {
        "steps": f"{last['step']:,} of {config.train.steps:,}",
        "tokens": f"{last['tokens']:,}",
        "training loss": f"{sum(line['loss'] for line in recent) / len(recent):.4f} (mean of the last {len(recent)} steps)",
    }
    validations = [line for line in lines if "validation_loss" in line]
    if validations:
        loss = validations[-1]["validation_loss"]
        rows["validation loss"] = f"{loss:.4f} (perplexity {math.exp(loss):.1f}) at step {validations[-1]['step']:,}"
    rows["unigram entropy"] = _unigram_entropy(config)
    rows["tokens/s"] = f"{median(line['tokens_per_second'] for line in steps):,.0f} (median)"
    rows["peak memory"] = f"{max(line['peak_memory_mib'] for line in steps):,.0f} MiB"
    rows["loss curve"] = plot_loss(run)
    return format_table(rows)


def _unigram_entropy(config: Config) -> str:
    """What ignoring the context costs, on the validation tokens of the run's data."""
    from titans_pretrain.data import unigram_entropy

    if not config.data.path:
        return "not computed for a mixture"
    try:
        refuse_commands(config)
        return f"{unigram_entropy(config.data.path, 'validation', config.data.cache_dir):.4f} (validation tokens)"
    except ValueError as e:  # the data may have moved since; the rest of the report still holds
        return f"not known: {e}"
