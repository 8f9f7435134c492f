"""Forecasts as a picture."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from titans_pretrain.forecasting.series import Scaling, Windows

PANELS = 4


@torch.no_grad()
def plot_forecasts(
    path: Path,
    forecasts: dict[str, Callable[[Tensor], Tensor]],
    windows: Windows,
    scaling: Scaling,
    variates: list[str],
) -> None:
    """Windows from the whole split, evenly spaced, of the last variate (the public files' target), in the file's units.

    forecasts: {name: [N, lookback] -> [N, horizon], standardised}."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    last = len(variates) - 1
    chosen = torch.linspace(0, windows.count - 1, min(PANELS, windows.count)).long()
    x, y = windows[chosen * windows.variates + last]
    mean, std = float(scaling.mean[last]), float(scaling.std[last])
    figure = Figure(figsize=(10, 2.2 * len(chosen)), layout="constrained")
    FigureCanvasAgg(figure)
    made = {name: forecast(x).double() * std + mean for name, forecast in forecasts.items()}
    before, after = range(-x.shape[1], 0), range(y.shape[1])
    for i, axes in enumerate(figure.subplots(len(chosen), squeeze=False)[:, 0]):
        axes.plot(before, x[i].double() * std + mean, color="gray", linewidth=1)
        axes.plot(after, y[i].double() * std + mean, color="black", linewidth=1, label="what came")
        for name, values in made.items():
            axes.plot(after, values[i], linewidth=1, label=name)
        axes.set_title(f"test window {int(chosen[i])}", fontsize=8)
        axes.set_ylabel(variates[last])
        axes.grid(alpha=0.3)
    axes.set_xlabel("rows after the window")
    figure.axes[0].legend(fontsize=8, ncols=len(made) + 1)
    figure.savefig(path, dpi=120, format="png")
