"""Decay tables of a tile and their adjoint.

Over a tile of b tokens (N, C and the vectors are as in the design's dual form):

    L_b[t,i] = prod_{i<s<=t} (1-alpha_s)      L_m[t,i] = prod_{i<s<=t} eta_s       unit lower triangular
    N = L_m diag(theta)                       C = L_b N
    beta_t = prod_{s<=t} (1-alpha_s)          m_t = prod_{s<=t} eta_s              f = L_b m

Products only, forward and backward: no logarithm and no division, so alpha = 1 and eta = 0 are exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Tables:
    """Matrices [..., b, b] and vectors [..., b]."""

    forget_decay: Tensor  # L_b
    momentum_decay: Tensor  # L_m
    surprise: Tensor  # N: what u_j adds to -S_t
    weight: Tensor  # C: what u_j adds to -W_t
    beta: Tensor
    f: Tensor
    m: Tensor

    def at(self, gate: int) -> "Tables":
        """The tables of one memory layer, from [..., gates, b(, b)]."""
        matrices = (self.forget_decay, self.momentum_decay, self.surprise, self.weight)
        return Tables(*(x[..., gate, :, :] for x in matrices), *(x[..., gate, :] for x in (self.beta, self.f, self.m)))


def decay_matrix(x: Tensor) -> Tensor:
    """L[t,i] = prod_{i<s<=t} x_s for i <= t, 0 above the diagonal. x [..., b] -> [..., b, b]."""
    b = x.shape[-1]
    after = torch.ones(b, b, dtype=torch.bool, device=x.device).triu(1)  # [i, t]: t > i
    return torch.where(after, x.unsqueeze(-2), 1.0).cumprod(-1).triu().mT


def decay_tables(forget: Tensor, momentum: Tensor, lr: Tensor) -> Tables:
    """Gates [..., b] -> tables of the tile."""
    keep = 1 - forget
    forget_decay, momentum_decay = decay_matrix(keep), decay_matrix(momentum)
    m = momentum.cumprod(-1)
    surprise = momentum_decay * lr.unsqueeze(-2)
    return Tables(
        forget_decay,
        momentum_decay,
        surprise,
        forget_decay @ surprise,
        keep.cumprod(-1),
        (forget_decay @ m.unsqueeze(-1)).squeeze(-1),
        m,
    )


def decay_tables_backward(
    tables: Tables, d_weight: Tensor, d_beta: Tensor, d_f: Tensor, d_last_surprise: Tensor, d_last_m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to (forget, momentum, lr), [..., b] each.

    d_weight [..., b, b], d_beta and d_f [..., b]: of C, beta, f. d_last_surprise [..., b], d_last_m [...]: of N's last row
    and of m's last entry, the only ones that the scan reads. d_weight is overwritten.
    """
    b = tables.beta.shape[-1]
    columns = torch.cat([d_weight, d_beta.unsqueeze(-1), d_f.unsqueeze(-1)], -1)
    lam = tables.forget_decay.mT @ columns
    lam_c, lam_beta, lam_f = lam[..., :b].tril(), lam[..., b], lam[..., b + 1]
    d_forget = -(
        (lam_c * _shift(tables.weight, -2, 0.0)).sum(-1)
        + lam_beta * _shift(tables.beta, -1, 1.0)
        + lam_f * _shift(tables.f, -1, 0.0)
    )
    columns = torch.cat([lam_c, lam_f.unsqueeze(-1)], -1)
    columns[..., -1, :b] += d_last_surprise
    columns[..., -1, b] += d_last_m
    mu = tables.momentum_decay.mT @ columns
    mu_n, mu_m = mu[..., :b].tril(), mu[..., b]
    d_momentum = (mu_n * _shift(tables.surprise, -2, 0.0)).sum(-1) + mu_m * _shift(tables.m, -1, 1.0)
    return d_forget, d_momentum, mu_n.diagonal(dim1=-2, dim2=-1)


def _shift(x: Tensor, dim: int, first: float) -> Tensor:
    """x moved one step later along dim, with `first` in the gap."""
    return torch.cat([torch.full_like(x.narrow(dim, 0, 1), first), x.narrow(dim, 0, x.shape[dim] - 1)], dim)
