"""What a forecast has to beat: the last value repeated, and the best linear map."""

from collections.abc import Callable

import torch
from torch import Tensor

from titans_pretrain.forecasting.metrics import errors
from titans_pretrain.forecasting.series import Windows

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # over the mean square of a value


def repeat_last(horizon: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x[:, -1:].expand(-1, horizon)


def fit_linear(train: Windows, validation: Windows, batch: int = 8192) -> Callable[[Tensor], Tensor]:
    """y - mean(x) = (x - mean(x)) W + b, one map for all variates: ridge regression, its strength chosen on the validation windows.

    DLinear (Zeng et al. 2023) is such a map, reached by gradient descent: moving averages are linear. Taking out the mean is what
    its later forms (NLinear, RLinear) add."""
    gram, cross, count = None, None, 0
    for x, y in train.batches(batch):
        mean = x.mean(-1, keepdim=True, dtype=torch.float64)
        centred = torch.cat((x - mean, torch.ones_like(mean)), -1)
        if gram is None:
            gram, cross = 0.0, 0.0
        gram, cross, count = gram + centred.T @ centred, cross + centred.T @ (y - mean), count + len(x)
    scale = gram.diagonal()[:-1].mean()  # of one value's square, over all examples
    penalty = torch.ones_like(gram[0])
    penalty[-1] = 0.0  # the intercept is free

    def at(ridge: float) -> Callable[[Tensor], Tensor]:
        weights = torch.linalg.solve(gram + torch.diag(ridge * scale * penalty), cross)

        def forecast(x: Tensor) -> Tensor:
            mean = x.mean(-1, keepdim=True)
            return (x - mean) @ weights[:-1].to(x) + weights[-1].to(x) + mean

        return forecast

    return min((at(ridge) for ridge in RIDGES), key=lambda found: errors(found, validation, batch)["mse"])
