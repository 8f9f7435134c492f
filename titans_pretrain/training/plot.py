"""The loss curve of a run as a picture."""

from pathlib import Path

from titans_pretrain.training.loggers import read_metrics


def plot_loss(run_dir: str | Path) -> Path | None:
    """Draws RUN/metrics.jsonl into RUN/loss.png: training and validation loss over tokens; None without a step."""
    run_dir = Path(run_dir)
    lines = read_metrics(run_dir / "metrics.jsonl")
    training = [(line["tokens"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["tokens"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    if not training:
        return None

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*training, strict=True), linewidth=0.8, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), marker="o", markersize=3, label="validation")
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=run_dir.resolve().name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run_dir / "loss.png", dpi=120)
    return run_dir / "loss.png"
