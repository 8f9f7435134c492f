"""What a run reached, in a few lines."""

import math
from pathlib import Path
from statistics import mean, median

from titans_pretrain.commands.report_page import write_page
from titans_pretrain.commands.table import format_table
from titans_pretrain.config import Config, load_run_config, refuse_commands
from titans_pretrain.training.guard import SPIKE
from titans_pretrain.training.loggers import read_metrics
from titans_pretrain.training.plot import plot_loss
from titans_pretrain.training.stragglers import slow_rank


def report(run_dir: str) -> str:
    """A table of a run folder's metrics; draws loss.png and writes report.html anew if the folder can be written. Raises ValueError
    for a folder that is no run, and for a file in it that is broken."""
    run = Path(run_dir)
    if not (run / "config.yaml").is_file() or not (run / "metrics.jsonl").is_file():
        raise ValueError(f"{run_dir} is not a run folder: it needs config.yaml and metrics.jsonl")
    config, lines = load_run_config(run), read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if {"loss", "tokens"} <= line.keys()]
    if not steps:
        raise ValueError(f"{run_dir} has not finished a step yet")
    columns = {
        name: [line[name] for line in steps if name in line] for name in {name for line in steps for name in line}
    }
    recent = [x for x in columns["loss"] if math.isfinite(x)][-max(1, len(steps) // 20) :] or [math.nan]
    rows: dict[str, object] = {
        "steps": f"{steps[-1]['step']:,} of {config.train.steps:,}",
        "tokens": f"{columns['tokens'][-1]:,}",
        "training loss": f"{mean(recent):.4f} (mean of the last {len(recent)} steps)",
    }
    if "skipped" in columns:
        spikes = columns["skipped"].count(SPIKE)
        rows["skipped steps"] = f"{len(columns['skipped']):,} ({spikes:,} of them spikes)"
    if back := [line for line in lines if "rolled_back_to" in line]:
        rows["rollbacks"] = ", ".join(f"at step {line['step']:,} to {line['rolled_back_to']:,}" for line in back)
    if "epochs" in columns:
        rows["epochs"] = f"{columns['epochs'][-1]:,.2f}"
    validations = [line for line in lines if "validation_loss" in line]
    if validations:
        loss = validations[-1]["validation_loss"]
        rows["validation loss"] = (
            f"{loss:.4f} (perplexity {math.exp(min(loss, 700)):.1f}) at step {validations[-1]['step']:,}"
        )
    entropy = held_out_entropy(config)
    rows["unigram entropy"] = entropy if isinstance(entropy, str) else f"{entropy:.4f} (validation tokens)"
    rows["tokens/s"] = f"{median(columns['tokens_per_second']):,.0f} (median)"
    if "mfu" in columns:
        rows["MFU"] = f"{median(columns['mfu']):.1%} (median)"
    if "checkpoint_stall" in columns:
        stalls = columns["checkpoint_stall"]  # told by the step after: none of a last checkpoint
        rows["waiting for checkpoints"] = f"{median(stalls):.2f} s for each (median of {len(stalls):,})"
    if (behind := slow_rank(lines)) is not None:
        rows["slow rank"] = behind
    rows["peak memory"] = f"{max(columns['peak_memory_mib']):,.0f} MiB"
    try:
        rows["loss curve"] = plot_loss(run, None if isinstance(entropy, str) else entropy)
    except Exception as e:  # a folder that is only to be read, a broken matplotlib: the rest of the report still holds
        rows["loss curve"] = f"not drawn: {' '.join(str(e).split())}"
    try:
        page = dict(rows)
        rows["page"] = write_page(run, page, lines, None if isinstance(entropy, str) else entropy)
    except Exception as e:
        rows["page"] = f"not written: {' '.join(str(e).split())}"
    return format_table(rows)


def held_out_entropy(config: Config) -> float | str:
    """What ignoring the context costs, in nats per token of the validation tokens of the run's data; or why it is not known."""
    from titans_pretrain.data import unigram_entropy

    if not config.data.path:
        return "not computed for a mixture"
    try:
        refuse_commands(config)
        return unigram_entropy(config.data.path, "validation", config.data.cache_dir)
    except (ValueError, OSError) as e:  # the data may have moved since; the rest of the report still holds
        return f"not known: {e}"
