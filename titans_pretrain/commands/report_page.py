"""A run as one page: RUN/report.html, which needs no network and no other file."""

import html
import io
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from titans_pretrain.disk import write_whole
from titans_pretrain.training.events import read_events
from titans_pretrain.training.guard import NOT_FINITE
from titans_pretrain.training.health import NAMES
from titans_pretrain.training.norms import GROUPS
from titans_pretrain.training.plot import smoothed

CURVES = {
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_second": "tokens/s",
    "mfu": "model FLOPs utilisation",
    "data_wait": "waiting for data, s",
    "checkpoint_stall": "waiting for checkpoints, s",
    "peak_memory_mib": "peak memory, MiB",
}
LOGARITHMIC = {"grad_norm", "lr"}
MOST_POINTS = 2000  # of a curve
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .15em 1.5em .15em 0; text-align: left; vertical-align: top }
td { font-variant-numeric: tabular-nums } th { font-weight: 600 }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1em } svg { width: 100%; height: auto }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px } .none { color: #777 }
"""


def write_page(
    run: Path, rows: Mapping[str, object], lines: Sequence[dict], unigram_entropy: float | None = None
) -> Path:
    """rows: of the table at the top; lines: of metrics.jsonl."""
    title = html.escape(run.resolve().name)
    parts = [
        f"<h1>{title}</h1>",
        _table(rows.items()),
        "<h2>Loss</h2>",
        _loss(lines, unigram_entropy),
        "<h2>Training</h2>",
        _plots([*_curves(lines), *_group_norms(lines)]),
        "<h2>Memory, by layer</h2>",
        _plots(_health(lines)) or '<p class="none">No layer was looked at (train.health_every).</p>',
        "<h2>Events</h2>",
        _table(_events(run, lines)) or '<p class="none">None.</p>',
        "<h2>Configuration</h2>",
        f"<pre>{html.escape((run / 'config.yaml').read_text(errors='replace'))}</pre>",
    ]
    page = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>\n<body>\n'
    target = run / "report.html"
    write_whole(target, (page + "\n".join(parts) + "\n</body></html>\n").encode())
    return target


def _table(rows: Iterable[tuple[object, object]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(str(a))}</th><td>{html.escape(str(b))}</td></tr>\n" for a, b in rows)
    return f"<table>\n{cells}</table>" if cells else ""


def _plots(figures: Iterable[str]) -> str:
    found = "\n".join(figures)
    return f'<div class="plots">\n{found}\n</div>' if found else ""


def _loss(lines: Sequence[dict], unigram_entropy: float | None) -> str:
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    figure, axes = _figure("loss, nats per token", (10, 4.2))
    steps, losses = zip(*training, strict=True)
    axes.plot(*_thinned(steps, losses), linewidth=0.7, alpha=0.4, color="tab:blue", label="training")
    axes.plot(*_thinned(steps, smoothed(losses)), color="tab:blue", label="training, smoothed")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", markersize=3, label="validation")
    averaged = [(line["step"], line["validation_loss_ema"]) for line in lines if "validation_loss_ema" in line]
    if averaged:
        axes.plot(
            *zip(*averaged, strict=True),
            color="tab:green",
            marker="o",
            markersize=3,
            label="validation, averaged weights",
        )
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="gray", linestyle="--", linewidth=1, label="unigram entropy")
    _mark_skipped(axes, lines)
    axes.legend()
    return _svg(figure)


def _curves(lines: Sequence[dict]) -> Iterable[str]:
    for name, label in CURVES.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points and any(math.isfinite(y) for _, y in points):
            figure, axes = _figure(label)
            axes.plot(*_thinned(*zip(*points, strict=True)), linewidth=0.9)
            if name in LOGARITHMIC and all(y > 0 for _, y in points if math.isfinite(y)):
                axes.set_yscale("log")
            if name == "grad_norm":
                _mark_skipped(axes, lines)
            yield _svg(figure)


def _group_norms(lines: Sequence[dict]) -> Iterable[str]:
    for kind, label in (("grad_norm", "gradient norm by group"), ("weight_norm", "norm of the weights by group")):
        curves = {
            group: [(x["step"], x[key]) for x in lines if key in x] for group in GROUPS for key in [f"{kind}.{group}"]
        }
        if not any(curves.values()):
            continue
        figure, axes = _figure(label)
        for group, points in curves.items():
            if points:
                axes.plot(*_thinned(*zip(*points, strict=True)), linewidth=0.9, marker=".", markersize=3, label=group)
        axes.set_yscale("log")
        axes.legend(fontsize="x-small")
        yield _svg(figure)


def _health(lines: Sequence[dict]) -> Iterable[str]:
    layers = sorted({int(name.split(".")[1]) for line in lines for name in line if name.startswith("memory.")})
    if not layers:
        return
    from matplotlib import colormaps

    for name, label in NAMES.items():
        figure, axes = _figure(f"{name}: {label}")
        for i in layers:
            key = f"memory.{i}.{name}"
            points = [(line["step"], line[key]) for line in lines if key in line]
            color = colormaps["viridis"](0.9 * layers.index(i) / max(1, len(layers) - 1))
            axes.plot(
                *zip(*points, strict=True), color=color, linewidth=0.9, marker=".", markersize=3, label=f"layer {i}"
            )
        if len(layers) > 8:  # the first and the last say which way the colours go
            handles, labels = axes.get_legend_handles_labels()
            axes.legend([handles[0], handles[-1]], [labels[0], labels[-1]], fontsize="x-small")
        else:
            axes.legend(fontsize="x-small")
        yield _svg(figure)


def _events(run: Path, lines: Sequence[dict]) -> list[tuple[str, str]]:
    """In the order of their steps."""
    found: list[tuple[int, str, str]] = []
    for event in read_events(run):
        details = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "event", "step"))
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        found.append((event["step"], f"step {event['step']:,}", f"{event['event']}, {when}, {details}"))
    for line in lines:
        at = line["step"], f"step {line['step']:,}"
        if "skipped" in line:
            kind = "not finite" if line["skipped"] == NOT_FINITE else "a spike"
            found.append((*at, f"no update: {kind} (loss {line['loss']:.4g}, gradient norm {line['grad_norm']:.4g})"))
        if "rolled_back_to" in line:
            found.append((*at, f"back to the weights of step {line['rolled_back_to']:,}"))
        if "checkpoint_stall" in line:
            found.append(
                (
                    line["step"] - 1,
                    f"step {line['step'] - 1:,}",
                    f"checkpoint; training waited {line['checkpoint_stall']:.2f} s",
                )
            )
    return [(when, what) for _, when, what in sorted(found, key=lambda event: event[0])]


def _mark_skipped(axes, lines: Sequence[dict]) -> None:
    for step in [line["step"] for line in lines if "skipped" in line][:MOST_POINTS]:
        axes.axvline(step, color="tab:red", linewidth=0.6, alpha=0.6)


def _figure(title: str, size: tuple[float, float] = (5, 3)):
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize="small")
    axes.set_xlabel("step", fontsize="small")
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure) -> str:
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):  # text, not a path for each letter
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Of each of MOST_POINTS equal parts its largest and smallest value: no spike is lost."""
    if len(x) <= 2 * MOST_POINTS:
        return list(x), list(y)
    size = -(-len(x) // MOST_POINTS)
    kept: list[int] = []
    for start in range(0, len(x), size):
        part = range(start, min(start + size, len(x)))
        kept += sorted({min(part, key=lambda i: y[i]), max(part, key=lambda i: y[i])})
    return [x[i] for i in kept], [y[i] for i in kept]
