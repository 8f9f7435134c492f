"""The telescoped step: a rescaling of theta that keeps the summed step of a chunk stable.

    theta'_t = theta_t prod_{j<t in the chunk} (1 - min(g theta_j |k_j.k_t|, 0.999))

g is the curvature of a token's inner loss for a key of unit length: 2 for the linear memory, where a chunk of equal keys then writes
in total what the token-by-token delta rule would, and less for a damped gradient. Orthogonal keys are untouched. It depends on lr
and k alone, so it is a pre-processing of `lr` and the scan does not know of it. Momentum repeats each write up to 1 / (1 - eta)
times: where nothing else bounds that, scale by 1 - eta outside the product; inside, the product would only saturate later.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.kernels.backends import without_autocast

MAX_SHRINK = 0.999


@dataclass(frozen=True)
class StepHistory:
    """Keys [B, n, H, D] and plain steps [B, n, H, gates] of the n tokens of a half-read chunk."""

    keys: Tensor
    steps: Tensor


def telescope(
    lr: Tensor, k: Tensor, *, chunk_size: int, coefficient: float = 2.0, history: StepHistory | None = None
) -> tuple[Tensor, StepHistory | None]:
    """Telescoped theta for T tokens.

    lr [B, T, H, gates] (1 or the memory's depth), k [B, T, H, D] l2-normalised; coefficient: g; history: the tokens of the chunk
    that an earlier call left half read. Returns lr' [B, T, H, gates], in float32 under autocast too, and the history for the next
    call (None at a chunk's start).
    """
    if lr.ndim != 4 or k.ndim != 4 or lr.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"lr is {tuple(lr.shape)} and k {tuple(k.shape)}; they must be [B, T, H, gates] and [B, T, H, D]"
        )
    if coefficient < 0:
        raise ValueError(f"the coefficient of telescope must be 0 or more, got {coefficient}")
    lead = 0
    if history is not None:
        lead = history.keys.shape[1]
        lr, k = torch.cat([history.steps, lr], 1), torch.cat([history.keys, k], 1)
    tokens = lr.shape[1]
    whole = tokens // chunk_size * chunk_size
    parts = []
    if whole:
        parts.append(_telescope_chunks(lr[:, :whole], k[:, :whole], chunk_size, coefficient))
    if whole < tokens:
        parts.append(_telescope_chunks(lr[:, whole:], k[:, whole:], tokens - whole, coefficient))
        rest = StepHistory(k[:, whole:], lr[:, whole:])
    else:
        rest = None
    return torch.cat(parts, 1)[:, lead:], rest


def _telescope_chunks(lr: Tensor, k: Tensor, size: int, coefficient: float) -> Tensor:
    """lr [B, n * size, H, gates], k [B, n * size, H, D] -> lr', chunks of `size` on their own."""
    with without_autocast(lr):  # as the scan does
        return _telescoped(lr, k, size, coefficient)


def _telescoped(lr: Tensor, k: Tensor, size: int, coefficient: float) -> Tensor:
    steps = lr.unflatten(1, (-1, size)).permute(0, 1, 3, 4, 2)  # [B, n, H, gates, size]
    keys = k.unflatten(1, (-1, size)).transpose(2, 3).to(lr.dtype)  # [B, n, H, size, D]
    overlap = coefficient * (keys @ keys.mT).abs().unsqueeze(3)  # [B, n, H, 1, t, j]
    earlier = torch.ones(size, size, dtype=torch.bool, device=lr.device).tril(-1)
    shrink = (steps.unsqueeze(-2) * overlap).clamp(max=MAX_SHRINK).masked_fill(~earlier, 0)
    scale = torch.log1p(-shrink).sum(-1).exp()  # bounded away from log(0) by MAX_SHRINK
    return (steps * scale).permute(0, 1, 4, 2, 3).flatten(1, 2)
