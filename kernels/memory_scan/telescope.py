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

    @staticmethod
    def of_rows(
        history: "StepHistory | None", keys: Tensor, steps: Tensor, offset: Tensor, chunk_size: int
    ) -> "StepHistory":
        """After one more token (keys [B, 1, H, D], steps [B, 1, H, gates]) of rows that stand at offsets [B] of their own: the
        last chunk_size - 1 tokens, with steps of zero, which have no effect, where they belong to an earlier chunk."""
        if history is not None:
            keys, steps = torch.cat([history.keys, keys], 1), torch.cat([history.steps, steps], 1)
        kept = min(keys.shape[1], chunk_size - 1)
        keys, steps = keys[:, keys.shape[1] - kept :], steps[:, steps.shape[1] - kept :]
        ended = (offset + 1) % chunk_size == 0
        return StepHistory(keys, steps.masked_fill(ended[:, None, None, None], 0.0))


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
    """Keeps its inputs only, and multiplies again in the backward pass: autograd alone would keep five tables of size x size a chunk.
    By hand, with s the shrink of a pair t, j and o = lr_t exp(sum_j log(1 - s)):  d_s = -d_o o / (1 - s) where s is not clamped."""

    @staticmethod
    def forward(ctx, lr, k, *options):
        ctx.save_for_backward(lr, k)
        ctx.options = options
        return _telescoped(lr, k, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        lr, k = ctx.saved_tensors
        size, coefficient, power = ctx.options
        with without_autocast(d):
            steps, keys, products, overlap = _pairs(lr, k, size, coefficient, power)
            raw = steps.unsqueeze(-2) * overlap
            shrink = _shrink(raw)
            scale = _scale(shrink)
            d = d.unflatten(1, (-1, size)).permute(0, 1, 3, 4, 2)  # [B, n, H, gates, t]
            d_shrink = (d * steps * scale).neg().unsqueeze(-1) / (1 - shrink)
            d_raw = d_shrink.masked_fill(raw > MAX_SHRINK, 0).tril(-1)
            d_steps = d * scale + (d_raw * overlap).sum(-2)
            d_products = (d_raw * steps.unsqueeze(-2)).sum(3) * coefficient
            d_products = d_products * (products.sign() if power == 1 else 2 * products)
            d_keys = (d_products + d_products.mT) @ keys
        d_lr = d_steps.permute(0, 1, 4, 2, 3).flatten(1, 2)
        return d_lr, d_keys.transpose(2, 3).flatten(1, 2).to(k.dtype), None, None, None


def _telescoped(lr: Tensor, k: Tensor, size: int, coefficient: float, power: int) -> Tensor:
    steps, _, _, overlap = _pairs(lr, k, size, coefficient, power)
    scale = _scale(_shrink(steps.unsqueeze(-2) * overlap))
    return (steps * scale).permute(0, 1, 4, 2, 3).flatten(1, 2)


def _pairs(lr: Tensor, k: Tensor, size: int, coefficient: float, power: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps [B, n, H, gates, size], keys [B, n, H, size, D], k_t.k_j [B, n, H, t, j], and g |k_t.k_j|^p [B, n, H, 1, t, j]."""
    steps = lr.unflatten(1, (-1, size)).permute(0, 1, 3, 4, 2)
    keys = k.unflatten(1, (-1, size)).transpose(2, 3).to(lr.dtype)
    products = keys @ keys.mT
    overlap = coefficient * (products.abs() if power == 1 else products.square()).unsqueeze(3)
    return steps, keys, products, overlap


def _shrink(raw: Tensor) -> Tensor:
    """By the tokens before."""
    return raw.clamp(max=MAX_SHRINK).tril(-1)


def _scale(shrink: Tensor) -> Tensor:
    return torch.log1p(-shrink).sum(-1).exp()  # bounded away from log(0) by MAX_SHRINK
