"""Decay tables of a tile and their adjoint.

Over a tile of b tokens (README.md, "Dual form"):

    L_b[t,i] = prod_{i<s<=t} (1-alpha_s)      L_m[t,i] = prod_{i<s<=t} eta_s       unit lower triangular
    N = L_m diag(theta)                       G = L_b N
    beta_t = prod_{s<=t} (1-alpha_s)          m_t = prod_{s<=t} eta_s              f = L_b m

Products only, forward and backward: no logarithm and no division, so alpha = 1 and eta = 0 are exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Tables:
    """Coefficients of the recurrence of equal tiles, [..., tiles, gates, *]: gates is L, or 1 for all memory layers."""

    forget_decay: Tensor  # L_b [b, b]
    momentum_decay: Tensor  # L_m [b, b]
    N: Tensor  # [b, b]: what u_j adds to -S_t
    G: Tensor  # [b, b]: what u_j adds to -W_t
    beta: Tensor  # [b]
    f: Tensor  # [b]
    m: Tensor  # [b]
    read: Tensor  # [b, 2]: beta, f
    last: Tensor  # [b, 2]: the last rows of G and N
    carry: Tensor  # [3]: beta_b, f_b, m_b

    def of_tile(self, tile: int, depth: int) -> "list[TileTables]":
        """What the scan reads of them, for each memory layer: of its own gate, or of the shared one."""
        return _of_tile(self, tile, depth)


@dataclass
class TileTables:
    """What the scan reads of a tile's tables for one memory layer, or the gradients of that; [BH, *]."""

    G: Tensor
    read: Tensor
    last: Tensor
    carry: Tensor


@dataclass
class TableGradients:
    """Gradients of what the scan reads of the tables, in their shapes."""

    G: Tensor
    read: Tensor
    last: Tensor
    carry: Tensor

    @staticmethod
    def zeros(tables: Tables) -> "TableGradients":
        return TableGradients(*(torch.zeros_like(x) for x in (tables.G, tables.read, tables.last, tables.carry)))

    def of_tile(self, tile: int, depth: int) -> list[TileTables]:
        """Views, for each memory layer: what is added there is added here."""
        return _of_tile(self, tile, depth)


def _of_tile(tables: Tables | TableGradients, tile: int, depth: int) -> list[TileTables]:
    read = (tables.G, tables.read, tables.last, tables.carry)
    gates = [TileTables(*(x[:, tile, gate] for x in read)) for gate in range(tables.carry.shape[2])]
    return gates if len(gates) == depth else gates * depth


def decay_matrix(x: Tensor) -> Tensor:
    """L[t,i] = prod_{i<s<=t} x_s for i <= t, 0 above the diagonal. x [..., b] -> [..., b, b]."""
    b = x.shape[-1]
    after = torch.ones(b, b, dtype=torch.bool, device=x.device).triu(1)  # [i, t]: t > i
    return torch.where(after, x.unsqueeze(-2), 1.0).cumprod(-1).triu().mT


def decay_tables(forget: Tensor, momentum: Tensor, lr: Tensor) -> Tables:
    """Gates [..., b] -> tables of the tiles."""
    keep = 1 - forget
    forget_decay, momentum_decay = decay_matrix(keep), decay_matrix(momentum)
    beta, m = keep.cumprod(-1), momentum.cumprod(-1)
    f = (forget_decay @ m.unsqueeze(-1)).squeeze(-1)
    N = momentum_decay * lr.unsqueeze(-2)
    G = forget_decay @ N
    read = torch.stack([beta, f], -1)
    last = torch.stack([G[..., -1, :], N[..., -1, :]], -1)
    carry = torch.stack([x[..., -1] for x in (beta, f, m)], -1)
    return Tables(forget_decay, momentum_decay, N, G, beta, f, m, read, last, carry)


def decay_tables_backward(tables: Tables, d: TableGradients) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to (forget, momentum, lr), [..., b] each. Overwrites d."""
    b = tables.beta.shape[-1]
    d.G[..., -1, :] += d.last[..., 0]
    d.read[..., -1, :] += d.carry[..., :2]
    lam = tables.forget_decay.mT @ torch.cat([d.G, d.read], -1)
    lam_g, lam_beta, lam_f = lam[..., :b].tril(), lam[..., b], lam[..., b + 1]
    d_forget = -(
        (lam_g * _shift(tables.G, -2, 0.0)).sum(-1)
        + lam_beta * _shift(tables.beta, -1, 1.0)
        + lam_f * _shift(tables.f, -1, 0.0)
    )
    columns = torch.cat([lam_g, lam_f.unsqueeze(-1)], -1)
    columns[..., -1, :b] += d.last[..., 1]
    columns[..., -1, b] += d.carry[..., 2]
    mu = tables.momentum_decay.mT @ columns
    mu_n, mu_m = mu[..., :b].tril(), mu[..., b]
    d_momentum = (mu_n * _shift(tables.N, -2, 0.0)).sum(-1) + mu_m * _shift(tables.m, -1, 1.0)
    return d_forget, d_momentum, mu_n.diagonal(dim1=-2, dim2=-1)


def _shift(x: Tensor, dim: int, first: float) -> Tensor:
    """x moved one step later along dim, with `first` in the gap."""
    return torch.cat([torch.full_like(x.narrow(dim, 0, 1), first), x.narrow(dim, 0, x.shape[dim] - 1)], dim)
