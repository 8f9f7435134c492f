"""An exponential moving average of the weights: average <- decay * average + (1 - decay) * weights, after every update.

It is one more state of the optimizer, beside the moments: in float32 where the weights or their masters are, cut as these are by
tensor and pipeline parallelism and by ZeRO, and in a checkpoint as they are.
"""

import torch
from torch import Tensor

from titans_pretrain.checkpoint.optimizer_states import AVERAGE


def average_weights(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Has the optimizer average its parameters from their values before its next step on, or from the average in its state. A step
    that its `found_inf` holds back does not count."""
    optimizer.averaging = True
    starts: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def remember(*_) -> None:
        for p in _parameters(optimizer):
            if AVERAGE not in optimizer.state.get(p, {}):  # made here, it would keep the moments from being made
                starts[p] = p.detach().clone()

    @torch.no_grad()
    def follow(*_) -> None:
        held = getattr(optimizer, "found_inf", None)
        for p in _parameters(optimizer):
            state = optimizer.state[p]
            if AVERAGE not in state:
                state[AVERAGE] = starts.pop(p)
            weight = 1 - decay if held is None else torch.where(held != 0, 0.0, 1 - decay).to(p.device, p.dtype)
            state[AVERAGE].lerp_(p, weight)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(follow)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
