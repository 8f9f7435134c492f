"""Muon for the hidden matrices of a model, with AdamW for all else, as one optimizer.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the learning rate of Liu et al. 2025 (arXiv 2502.16982, equation 4): an
orthogonal update of a matrix [a, b] has entries of root mean square 1 / sqrt(max(a, b)); 0.2 * sqrt(max(a, b)) makes them as
large as AdamW's, so that its learning rate and weight decay keep their meaning. To the bit this is torch.optim.Muon with
adjust_lr_fn="match_rms_adamw", which cannot leave a harmful step out, nor update a matrix of which it has a part.
"""

import math
from collections.abc import Callable, Iterator
from types import EllipsisType

import torch
from torch import Tensor

from titans_pretrain.checkpoint.optimizer_states import MOMENTS

MOMENTUM = "momentum_buffer"  # its name among an optimizer's states, torch's
COEFFICIENTS, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
DTYPE = torch.bfloat16  # of the iteration
Direction = tuple[slice | EllipsisType, Tensor, float]  # where in the parameter, the orthogonal part, its scale
Directions = Callable[[Tensor, Tensor], Iterator[Direction]]


class Muon(torch.optim.Optimizer):
    """matrices [a, b]: updated by Muon with Nesterov momentum; others: parameter groups of AdamW, whose options `adamw` has.

    directions: (parameter, update) -> what to add where; whole_matrix where this process has the matrices whole. One that knows
    more takes its place when matrices are cut. found_inf: None, or a scalar of the device; where it is not 0 a step changes nothing."""

    found_inf: Tensor | None = None

    def __init__(
        self, matrices: list[Tensor], others: list[dict], *, lr: float, weight_decay: float, momentum: float, **adamw
    ):
        self._adamw = torch.optim.AdamW(others, lr=lr, **adamw)
        group = {"params": matrices, "weight_decay": weight_decay, "momentum": momentum, "muon": True}
        super().__init__([group, *self._adamw.param_groups], self._adamw.defaults | {"muon": False})
        self.directions: Directions = whole_matrix
        self._matrices = set(matrices)

    def moments_of(self, p: Tensor) -> tuple[str, ...]:
        """Names of the states of a parameter, or of the piece of a flat tensor that ZeRO puts into a group for many."""
        pieces = (q for group in self.param_groups if group["muon"] for q in group["params"])
        return (MOMENTUM,) if p in self._matrices or any(p is q for q in pieces) else MOMENTS

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        # Anew each time: DeepSpeed puts other groups in their place, and others' parameters into them.
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state, self._adamw.found_inf = self.state, self.found_inf
        self._adamw.step()
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict) -> None:
        state, lr = self.state[p], group["lr"]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(p)
        momentum = state[MOMENTUM].lerp(p.grad, 1 - group["momentum"])
        new = p * (1 - lr * group["weight_decay"])
        for where, direction, scale in self.directions(p, p.grad.lerp(momentum, group["momentum"])):
            new[where].add_(direction, alpha=-lr * scale)
        for old, now in ((state[MOMENTUM], momentum), (p, new)):
            old.copy_(now if self.found_inf is None else torch.where(self.found_inf != 0, old, now))


def whole_matrix(p: Tensor, update: Tensor) -> Iterator[Direction]:
    yield ..., orthogonalized(update), scale_of(update.shape)


def scale_of(shape: torch.Size) -> float:
    """Of the update of a matrix of this shape: its entries then have a root mean square of about 0.2, as AdamW's."""
    return 0.2 * math.sqrt(max(shape))


def orthogonalized(update: Tensor) -> Tensor:
    """U V^T, about, of update [a, b] = U S V^T: five steps of Newton and Schulz take the singular values into 0.7 ... 1.2."""
    x = update.to(DTYPE)
    wide = x if x.shape[0] <= x.shape[1] else x.T  # the smaller Gram matrix
    wide = wide / wide.norm().clamp(min=EPS)
    first, third, fifth = COEFFICIENTS
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), wide, beta=first)
    return wide if x.shape[0] <= x.shape[1] else wide.T
