"""What turns batches into updated weights. The trainer sees this interface; titans_pretrain/parallel/ has the other one."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from titans_pretrain.config import Config
from titans_pretrain.models.inputs import check_values
from titans_pretrain.training.guard import UpdateGuard
from titans_pretrain.training.norms import sum_squares
from titans_pretrain.training.optimizer import build_optimizer, set_learning_rate


class Engine(Protocol):
    """model holds this process's parameters under their global names; optimizer is torch's or a DeepSpeed engine."""

    model: nn.Module
    optimizer: object
    micro_batches: int  # of this process in a step, after train.batch_warmup
    tensor_group: object | None  # the processes over which a sharded parameter's pieces are spread
    data_group: object | None  # the processes that hold the same parameters as this one
    guard: UpdateGuard  # over `update`
    is_main: bool  # whether this process prints and writes logs
    before_step: Callable[[], None] | None  # called in each `update`, with the gradients as they are before clipping

    def count(self, batches: Sequence) -> int:
        """Targets of these batches, over all processes."""

    def forward_backward(self, batches: Sequence, targets: int) -> Tensor:
        """Adds the gradients of sum(losses) / targets; returns that loss, over all processes: a scalar on the device."""

    def update(self, rate: float, loss: Tensor) -> Tensor:
        """One optimizer step with clipping, at this learning rate. Returns the gradients' norm before clipping, likewise. Where the
        guard finds harm in it or the loss, the weights stay as they are: nobody has to look before the next step."""

    def group_squares(self) -> Tensor:
        """What before_step may ask: sums of squares of the whole model's gradients and weights, see norms.sum_squares."""

    def evaluate(self, batches: Sequence) -> float:
        """Sum of the losses of these batches' targets, over all processes, without gradients."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""


class SingleEngine:
    """One model on one device."""

    is_main, tensor_group, data_group = True, None, None
    before_step: Callable[[], None] | None = None

    def __init__(self, config: Config, model: nn.Module, device: torch.device):
        self.config, self.model, self.device = config, model, device
        self.micro_batches = config.train.accumulation
        self.optimizer = build_optimizer(model, config.train)
        self.guard = UpdateGuard(self.optimizer, device, config.train)

    def count(self, batches: Sequence) -> int:
        return sum(count_targets(batch) for batch in batches)

    def forward_backward(self, batches: Sequence, targets: int) -> Tensor:
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with compute_dtype(self.device, self.config.train.precision):
                loss = self.model(**on_device(batch, self.config, self.device), num_items_in_batch=targets).loss
            loss.backward()
            total = total + loss.detach()
        return total

    def update(self, rate: float, loss: Tensor) -> Tensor:
        if self.before_step is not None:
            self.before_step()
        largest = self.config.train.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), largest)
        self.guard.watch(loss, norm)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def group_squares(self) -> Tensor:
        return sum_squares(((n, p.grad, p) for n, p in self.model.named_parameters()), self.device)

    def evaluate(self, batches: Sequence) -> float:
        with torch.no_grad(), compute_dtype(self.device, self.config.train.precision):
            losses = [self.model(**on_device(b, self.config, self.device), num_items_in_batch=1).loss for b in batches]
        return float(torch.stack(losses).double().sum())

    def any(self, flag: bool) -> bool:
        return flag


def count_targets(batch) -> int:
    """Positions of a batch that have a label."""
    return int((batch.labels != -100).sum())


def on_device(batch, config: Config, device: torch.device) -> dict:
    """A batch as the model's arguments. Raises ValueError, before it leaves the CPU, where the model cannot read it."""
    check_values(config.model, batch.tokens, batch.positions)
    fields = {"tokens": batch.tokens, "labels": batch.labels, "positions": batch.positions}
    return {name: x if x is None else x.to(device, non_blocking=True) for name, x in fields.items()}


def compute_dtype(device: torch.device, precision: str) -> torch.autocast:
    """fp32: as the parameters are; bf16: matrix products under autocast (the memory's state stays float32 by itself)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def pick_device(name: str) -> torch.device:
    """auto: a GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device=cuda, but torch sees no GPU here; use train.device=cpu or auto")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))
