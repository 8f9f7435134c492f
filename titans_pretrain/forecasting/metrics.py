"""Mean squared and mean absolute error of forecasts, in the units of the windows (standardised values)."""

from collections.abc import Callable

import torch
from torch import Tensor

from titans_pretrain.forecasting.series import Windows


@torch.no_grad()
def errors(
    forecast: Callable[[Tensor], Tensor], windows: Windows, batch: int, device: str | torch.device = "cpu"
) -> dict:
    """{"mse", "mae"} over every value of every window, variate and step of the horizon. forecast: [N, lookback] -> [N, horizon]."""
    squared, absolute, count = 0.0, 0.0, 0
    for x, y in windows.batches(batch):
        error = (forecast(x.to(device)).cpu() - y).double()
        squared += error.square().sum().item()
        absolute += error.abs().sum().item()
        count += error.numel()
    return {"mse": squared / count, "mae": absolute / count}
