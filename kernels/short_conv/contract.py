"""The public short convolution: one contract, several backends."""

import torch
from torch import Tensor

from titans_pretrain.kernels.backends import Backend, choose, without_autocast
from titans_pretrain.kernels.short_conv import reference, shifts

# In the order in which "auto" tries them.
BACKENDS = (Backend("shifts", shifts.convolve), Backend("reference", reference.convolve))


def causal_conv(
    x: Tensor,
    weight: Tensor,
    *,
    tail: Tensor | None = None,
    positions: Tensor | None = None,
    initial: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y_t = sum over i of weight[:, i] * x_{t - (K - 1) + i}, per channel, no bias.

    Args:
        x: [B, T, C], T >= 1.
        weight: [C, K]; weight[:, K - 1] multiplies the current token.
        tail: [B, K - 1, C]: the inputs directly before this call. None: `initial`, or zeros.
        positions: [B, T] int64, position of each token in its document, negative for padding (read as 0). Taps that
            reach before the document's start read `initial` as if it stood directly before the document. None: no
            document starts here.
        initial: [1 or B, K - 1, C]; None: zeros.
        backend: "auto", "shifts" (multiply-adds of shifted inputs, gradients written out) or "reference" (every token's window
            gathered, the oracle).

    Returns:
        y [B, T, C] in x's dtype and the tail of the next call, [B, K - 1, C]: the last K - 1 inputs. Sums, those of the
        gradients too, run in float32 or better.

    Raises:
        ValueError: a shape, dtype or backend that does not fit; one line that names the argument.
    """
    _check(x, weight, tail, positions, initial)
    batch, tokens, channels = x.shape
    before = weight.shape[1] - 1
    if initial is not None:
        initial = initial.to(x.dtype)
    if tail is None:
        tail = x.new_zeros(batch, before, channels) if initial is None else initial.expand(batch, -1, -1)
    extended = torch.cat((tail.to(x.dtype), x), 1)
    limit = None if positions is None else positions.clamp(min=0)
    arguments = dict(extended=extended, weight=weight, limit=limit, initial=initial)
    with without_autocast(x):
        y = choose("causal_conv", BACKENDS, backend, arguments).run(**arguments)
    return y, extended[:, tokens:].clone()  # cloned: a view would keep the whole sequence alive inside the state


def _check(x, weight, tail, positions, initial) -> None:
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x must be [B, T, C] with no empty dimension, got {tuple(x.shape)}")
    for name, value in (("x", x), ("weight", weight)):
        if not value.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {value.dtype}")
    batch, tokens, channels = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        raise ValueError(f"weight is {tuple(weight.shape)}; it must be [C, K] with C={channels} and K >= 1")
    before = weight.shape[1] - 1
    if tail is not None and tail.shape != (batch, before, channels):
        raise ValueError(f"tail is {tuple(tail.shape)}; it must be [B, K - 1, C] = {(batch, before, channels)}")
    if positions is not None and (positions.shape != (batch, tokens) or positions.dtype != torch.int64):
        raise ValueError(
            f"positions is {tuple(positions.shape)} {positions.dtype}; it must be {(batch, tokens)} torch.int64"
        )
    if initial is not None and initial.shape not in ((1, before, channels), (batch, before, channels)):
        raise ValueError(
            f"initial is {tuple(initial.shape)}; it must be [1 or B, K - 1, C] = {(batch, before, channels)}"
        )
