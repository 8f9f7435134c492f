"""Keeping what is not finite out of the weights, without a wait for the device."""

import torch
from torch import Tensor


class FiniteGuard:
    """From the first number on that is not finite, no step of this optimizer changes anything.

    The flag is on the device, where torch's fused optimizers read it (the one that torch.amp.GradScaler gives them); the host may
    read the numbers later and still finds the weights of the last good step.

    optimizer: a fused one of torch, none of whose parameters is on another device."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self._broken = torch.zeros((), dtype=torch.float32, device=device)
        optimizer.found_inf = self._broken

    def watch(self, *numbers: Tensor) -> None:
        """Scalars on the device, before the step that they belong to."""
        for number in numbers:
            self._broken.masked_fill_(~number.isfinite(), 1.0)
