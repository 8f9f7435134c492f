"""Which updates are not made. Decided on the device, so that no step waits for the host to look."""

import math

import torch
from torch import Tensor

from titans_pretrain.config import TrainConfig

FINE, NOT_FINITE, SPIKE = 0, 1, 2  # verdicts


class UpdateGuard:
    """Looks at the loss and the gradient norm of every step, and keeps the optimizer from an update that would do harm.

    One that is not finite is the first case (`train.on_nan`). The second is a spike (`train.on_spike`): one that lies more than
    `train.spike_sigma` standard deviations above the mean of its last `train.spike_window` finite values, once there are half as
    many; the rule of OLMo-core's SkipStepOptimizer. With "stop" no later update is made either, so that a host that looks late
    still finds the weights of the last good step.

    The flag is a tensor of the device, where torch's fused optimizers read it (the one that torch.amp.GradScaler gives them): weights,
    moments and the optimizer's count of steps stay as they were.

    optimizer: a fused one of torch or Muon, none of whose parameters is on another device."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, train: TrainConfig):
        self.train = train
        self.verdict = torch.tensor(FINE, device=device)  # of the last step
        self._hold = torch.zeros((), dtype=torch.float32, device=device)
        self._stopped = torch.zeros((), dtype=torch.bool, device=device)
        self._window = torch.full((2, train.spike_window), torch.nan, dtype=torch.float64, device=device)
        self._seen = torch.zeros(1, dtype=torch.int64, device=device)  # values that went into the window
        optimizer.found_inf = self._hold

    def watch(self, loss: Tensor, norm: Tensor) -> None:
        """Scalars, alike on every process, before the update that they belong to."""
        now = torch.stack([loss.to(self._hold.device).double(), norm.to(self._hold.device).double()])
        finite = now.isfinite().all()
        self.verdict = torch.where(finite, FINE, NOT_FINITE)
        stopping = torch.zeros_like(self._stopped)
        if self.train.on_nan == "stop":
            stopping = ~finite
        if self.train.on_spike != "ignore":
            spike = finite & self._outlies(now)
            self.verdict = torch.where(spike, SPIKE, self.verdict)
            if self.train.on_spike == "stop":
                stopping = stopping | spike
            slot = self._seen % self._window.shape[1]
            # A spike is remembered too: a loss that has moved for good is no spike for ever.
            self._window.index_copy_(1, slot, torch.where(finite, now[:, None], self._window.index_select(1, slot)))
            self._seen += finite
        self._stopped |= stopping
        self._hold.copy_(self._stopped | (self.verdict != FINE))

    def _outlies(self, now: Tensor) -> Tensor:
        known = self._window.isfinite()
        count = known.sum(1)
        values = torch.where(known, self._window, 0.0)
        mean = values.sum(1) / count
        deviation = (torch.where(known, (values - mean[:, None]).square(), 0.0).sum(1) / (count - 1)).sqrt()
        far = now > mean + self.train.spike_sigma * deviation  # not where there is nothing to compare with
        return (far & (2 * count >= self._window.shape[1])).any()

    def state_dict(self) -> dict:
        """JSON-able. What the next verdicts depend on."""
        window = [[None if math.isnan(x) else x for x in row] for row in self._window.tolist()]
        return {"window": window, "seen": int(self._seen)}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for what is no state of a guard; another window's is not taken over."""
        try:
            rows = [[math.nan if x is None else float(x) for x in row] for row in state["window"]]
            window, seen = torch.tensor(rows, dtype=torch.float64), int(state["seen"])
        except (TypeError, KeyError, ValueError) as e:
            raise ValueError(f"no state of the guard over updates: {e!r}") from e
        if window.shape == self._window.shape:
            self._window.copy_(window)
            self._seen.fill_(seen)
