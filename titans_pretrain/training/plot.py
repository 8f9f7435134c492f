"""The loss curve of a run as a picture."""

import io
import math
from pathlib import Path

from titans_pretrain.disk import write_whole
from titans_pretrain.training.loggers import read_metrics

SMOOTHED = 50  # the smoothed curve's memory is one part in so many of the run, in steps


def plot_loss(run_dir: str | Path, unigram_entropy: float | None = None) -> Path | None:
    """Draws RUN/metrics.jsonl into RUN/loss.png: training and validation loss over tokens; None without a step.

    unigram_entropy: of the validation tokens, nats per token; a line to compare with."""
    run_dir = Path(run_dir)
    lines = read_metrics(run_dir / "metrics.jsonl")
    training = [(line["tokens"], line["loss"]) for line in lines if {"loss", "tokens"} <= line.keys()]
    validation = [
        (line["tokens"], line["validation_loss"]) for line in lines if {"validation_loss", "tokens"} <= line.keys()
    ]
    if not training:
        return None

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens, losses = zip(*training, strict=True)
    axes.plot(tokens, losses, linewidth=0.8, color="tab:blue", alpha=0.4, label="training")
    axes.plot(tokens, smoothed(losses), color="tab:blue", label="training, smoothed")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", markersize=3, label="validation")
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="gray", linestyle="--", linewidth=1, label="unigram entropy")
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=run_dir.resolve().name)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20M
    axes.grid(alpha=0.3)
    axes.legend()
    target = run_dir / "loss.png"
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_whole(target, picture.getvalue())
    return target


def smoothed(losses: list[float] | tuple[float, ...]) -> list[float]:
    """Exponential mean over the newest steps, unbiased at the start."""
    keep = 1 - 1 / max(1.0, len(losses) / SMOOTHED)
    total, weight, means = 0.0, 0.0, []
    for loss in losses:
        if math.isfinite(loss):  # not that of a skipped step
            total, weight = keep * total + loss, keep * weight + 1
        means.append(total / weight if weight else math.nan)
    return means
