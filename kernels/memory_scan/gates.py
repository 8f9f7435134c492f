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
    """Coefficients of a tile's recurrence, per gate (chunk_forward.py says how they are used)."""

    forget_decay: Tensor  # L_b [..., b, b]
    momentum_decay: Tensor  # L_m [..., b, b]
    surprise: Tensor  # N [..., b, b]: what u_j adds to -S_t
    weight: Tensor  # C [..., b, b]: what u_j adds to -W_t
    beta: Tensor  # [..., b]
    f: Tensor  # [..., b]
    m: Tensor  # [..., b]
    read: Tensor  # [..., b, 2]: beta, f
    last: Tensor  # [..., b, 2]: the last rows of C and N
    carry: Tensor  # [..., 3]: beta_b, f_b, m_b

    def at(self, tile: int, gate: int) -> "TileTables":
        """One tile's coefficients of one gate, from tables [N, G, gates, ...]."""
        return TileTables(*(x[:, tile, gate] for x in (self.weight, self.read, self.last, self.carry)))


@dataclass
class TileTables:
    """What the scan reads of a tile's tables, or the gradients of that; [N, ...]."""

    weight: Tensor
    read: Tensor
    last: Tensor
    carry: Tensor


@dataclass
class TableGradients:
    """Gradients of what the scan reads from the tables, [N, G, gates, ...]."""

    weight: Tensor
    read: Tensor
    last: Tensor
    carry: Tensor

    @staticmethod
    def zeros(tables: Tables) -> "TableGradients":
        return TableGradients(*(torch.zeros_like(x) for x in (tables.weight, tables.read, tables.last, tables.carry)))

    at = Tables.at


def decay_matrix(x: Tensor) -> Tensor:
    """L[t,i] = prod_{i<s<=t} x_s for i <= t, 0 above the diagonal. x [..., b] -> [..., b, b]."""
    b = x.shape[-1]
    after = torch.ones(b, b, dtype=torch.bool, device=x.device).triu(1)  # [i, t]: t > i
    return torch.where(after, x.unsqueeze(-2), 1.0).cumprod(-1).triu().mT


def decay_tables(forget: Tensor, momentum: Tensor, lr: Tensor) -> Tables:
    """Gates [..., b] -> tables of the tile."""
    keep = 1 - forget
    forget_decay, momentum_decay = decay_matrix(keep), decay_matrix(momentum)
    beta, m = keep.cumprod(-1), momentum.cumprod(-1)
    f = (forget_decay @ m.unsqueeze(-1)).squeeze(-1)
    surprise = momentum_decay * lr.unsqueeze(-2)
    weight = forget_decay @ surprise
    read = torch.stack([beta, f], -1)
    last = torch.stack([weight[..., -1, :], surprise[..., -1, :]], -1)
    carry = torch.stack([x[..., -1] for x in (beta, f, m)], -1)
    return Tables(forget_decay, momentum_decay, surprise, weight, beta, f, m, read, last, carry)


def decay_tables_backward(tables: Tables, d: TableGradients) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to (forget, momentum, lr), [..., b] each. Overwrites d."""
    b = tables.beta.shape[-1]
    d.weight[..., -1, :] += d.last[..., 0]
    d.read[..., -1, :] += d.carry[..., :2]
    lam = tables.forget_decay.mT @ torch.cat([d.weight, d.read], -1)
    lam_c, lam_beta, lam_f = lam[..., :b].tril(), lam[..., b], lam[..., b + 1]
    d_forget = -(
        (lam_c * _shift(tables.weight, -2, 0.0)).sum(-1)
        + lam_beta * _shift(tables.beta, -1, 1.0)
        + lam_f * _shift(tables.f, -1, 0.0)
    )
    columns = torch.cat([lam_c, lam_f.unsqueeze(-1)], -1)
    columns[..., -1, :b] += d.last[..., 1]
    columns[..., -1, b] += d.carry[..., 2]
    mu = tables.momentum_decay.mT @ columns
    mu_n, mu_m = mu[..., :b].tril(), mu[..., b]
    d_momentum = (mu_n * _shift(tables.surprise, -2, 0.0)).sum(-1) + mu_m * _shift(tables.m, -1, 1.0)
    return d_forget, d_momentum, mu_n.diagonal(dim1=-2, dim2=-1)


def _shift(x: Tensor, dim: int, first: float) -> Tensor:
    """x moved one step later along dim, with `first` in the gap."""
    return torch.cat([torch.full_like(x.narrow(dim, 0, 1), first), x.narrow(dim, 0, x.shape[dim] - 1)], dim)
