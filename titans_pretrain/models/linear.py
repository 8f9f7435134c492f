"""Linear maps and look-ups that know how they are initialised."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def small_init(dim: int) -> float:
    """Standard deviation of the projections of a model of this width, sqrt(2 / (5 dim)) (Nguyen and Salazar 2019)."""
    return (2 / (5 * dim)) ** 0.5


class Projection(nn.Linear):
    """A linear map without a bias, N(0, std)."""

    def __init__(self, inputs: int, outputs: int, std: float):
        self.std = std  # nn.Linear's constructor initialises
        super().__init__(inputs, outputs, bias=False)

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def reset_parameters(self) -> None:
        self.init_weights()


class GateProjection(nn.Linear):
    """x W + b in float32 or better, [..., gates], of an x of any dtype: a bfloat16 sum with -6 leaves a handful of different gates.

    weight N(0, std), bias constant.
    """

    def __init__(self, inputs: int, gates: int, std: float, bias: float):
        self.std, self.start = std, bias
        super().__init__(inputs, gates)

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        nn.init.constant_(self.bias, self.start)

    def reset_parameters(self) -> None:
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        return linear_with_exact_bias(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """Rows N(0, std)."""

    def __init__(self, rows: int, dim: int, std: float):
        self.std = std
        super().__init__(rows, dim)

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def reset_parameters(self) -> None:
        self.init_weights()


def linear_with_exact_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product in the dtype that autocast gives it, the sum with the bias in float32 or better."""
    y = F.linear(x, weight)
    dtype = torch.promote_types(y.dtype, torch.float32)
    return y.to(dtype) + bias.to(dtype)
