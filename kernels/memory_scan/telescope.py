"""The telescoped step: a rescaling of theta that keeps the summed step of a chunk stable.

    theta'_t = (1 - eta_t) theta_t prod_{j<t in the chunk} (1 - min(g theta_j |k_j.k_t|^p, 0.999))

With p = 2 the factors are k_t^T (I - g theta_j k_j k_j^T) k_t, what token-by-token steps of a delta rule leave of k_t along itself;
p = 1 is more careful with keys that overlap in part. For equal keys the summed step stays below 1 / g either way; orthogonal keys
are untouched. Momentum repeats each write up to 1 / (1 - eta) times, so its factor stands outside the product: inside, the product
would only saturate later. All of it depends on lr, momentum and k alone, so it is a pre-processing of `lr` and the scan does not
know of it. docs/stability.md has the argument.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_pretrain.kernels.backends import without_autocast

MAX_SHRINK = 0.999


@dataclass(frozen=True)
class StepHistory:
    """Keys [B, n, H, D] and plain steps [B, n, H, gates] of the n tokens of a half-read chunk."""

    keys: Tensor
    steps: Tensor


def telescope(
    lr: Tensor,
    momentum: Tensor,
    k: Tensor,
    *,
    chunk_size: int,
    coefficient: float = 2.0,
    power: int = 1,
    history: StepHistory | None = None,
) -> tuple[Tensor, StepHistory | None]:
    """Telescoped theta for T tokens.

    lr and momentum [B, T, H, gates] (1 or the memory's depth), k [B, T, H, D] l2-normalised; coefficient: g; power: p, 1 or 2;
    history: the tokens of the chunk that an earlier call left half read. Returns lr' [B, T, H, gates] and the history for the next
    call (None at a chunk's start). Raises ValueError.
    """
    if lr.ndim != 4 or k.ndim != 4 or lr.shape[:3] != k.shape[:3] or momentum.shape != lr.shape:
        raise ValueError(
            f"lr is {tuple(lr.shape)}, momentum {tuple(momentum.shape)} and k {tuple(k.shape)}; they must be [B, T, H, gates] twice "
            "and [B, T, H, D]"
        )
    if coefficient < 0:
        raise ValueError(f"the coefficient of telescope must be 0 or more, got {coefficient}")
    if power not in (1, 2):
        raise ValueError(f"the power of telescope must be 1 or 2, got {power}")
    lead = 0
    if history is not None:
        lead = history.keys.shape[1]
        lr, k = torch.cat([history.steps, lr], 1), torch.cat([history.keys, k], 1)
    tokens = lr.shape[1]
    whole = tokens // chunk_size * chunk_size
    parts = []
    if whole:
        parts.append(_telescope_chunks(lr[:, :whole], k[:, :whole], chunk_size, coefficient, power))
    if whole < tokens:
        parts.append(_telescope_chunks(lr[:, whole:], k[:, whole:], tokens - whole, coefficient, power))
        rest = StepHistory(k[:, whole:], lr[:, whole:])
    else:
        rest = None
    return torch.cat(parts, 1)[:, lead:] * (1 - momentum), rest


def _telescope_chunks(lr: Tensor, k: Tensor, size: int, coefficient: float, power: int) -> Tensor:
    """lr [B, n * size, H, gates], k [B, n * size, H, D] -> lr', chunks of `size` on their own."""
    with without_autocast(lr):  # as the scan does
        return _Telescope.apply(lr, k, size, coefficient, power)


class _Telescope(torch.autograd.Function):
    """Keeps its inputs only, and multiplies again in the backward pass: autograd alone would keep five tables of size x size a chunk."""

    @staticmethod
    def forward(ctx, lr, k, *options):
        ctx.save_for_backward(lr, k)
        ctx.options = options
        return _telescoped(lr, k, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        lr, k = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad(), without_autocast(d):
            out = _telescoped(lr, k, *ctx.options)
        return (*torch.autograd.grad(out, (lr, k), d), None, None, None)


def _telescoped(lr: Tensor, k: Tensor, size: int, coefficient: float, power: int) -> Tensor:
    steps = lr.unflatten(1, (-1, size)).permute(0, 1, 3, 4, 2)  # [B, n, H, gates, size]
    keys = k.unflatten(1, (-1, size)).transpose(2, 3).to(lr.dtype)  # [B, n, H, size, D]
    overlap = keys @ keys.mT
    overlap = coefficient * (overlap.abs() if power == 1 else overlap.square()).unsqueeze(3)  # [B, n, H, 1, t, j]
    earlier = torch.ones(size, size, dtype=torch.bool, device=lr.device).tril(-1)
    shrink = (steps.unsqueeze(-2) * overlap).clamp(max=MAX_SHRINK).masked_fill(~earlier, 0)
    scale = torch.log1p(-shrink).sum(-1).exp()  # bounded away from log(0) by MAX_SHRINK
    return (steps * scale).permute(0, 1, 4, 2, 3).flatten(1, 2)
