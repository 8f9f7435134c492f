"""Training steps of one rank among many: forward and backward in the layout's way, gradients reduced, one optimizer step."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titans_pretrain.config import Config
from titans_pretrain.models.causal_lm import TitansForCausalLM
from titans_pretrain.parallel.gradients import (
    all_reduce_in_buckets,
    clip_by_global_norm,
    is_counted,
    sum_tied_gradients,
)
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.pipeline import Pipeline
from titans_pretrain.parallel.ring import RingLink
from titans_pretrain.training.engine import compute_dtype, count_targets, on_device
from titans_pretrain.training.guard import UpdateGuard
from titans_pretrain.training.norms import sum_squares
from titans_pretrain.training.optimizer import set_learning_rate
from titans_pretrain.training.stopwatch import Stopwatch
from titans_pretrain.training.stragglers import MEETING, PASSES, RING


class ParallelEngine:
    """See training.engine.Engine. Made by apply.py."""

    before_step: Callable[[], None] | None = None

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        model: TitansForCausalLM,
        modules: list[nn.Module],
        pipeline: Pipeline | None,
        optimizer: torch.optim.Optimizer | None,
        zero: Any = None,
    ):
        """model: this rank's parameters; modules: what is called, one per stage; zero: a DeepSpeed engine instead of an optimizer."""
        assert pipeline is not None or len(modules) == 1, "only a pipeline's schedule runs several stages"
        self.config, self.mesh, self.model, self.modules, self.pipeline = config, mesh, model, modules, pipeline
        self._torch_optimizer, self.zero = optimizer, zero
        self.optimizer = zero or optimizer
        if optimizer is not None:
            device = torch.device("cpu") if config.parallel.offload_optimizer else mesh.device
            self.guard = UpdateGuard(optimizer, device, config.train)
            if zero is not None:
                optimizer.register_step_pre_hook(self._watch_zero)
        self.stopwatch = Stopwatch(mesh.device)
        for module in modules:
            if isinstance(link := getattr(module, "link", None), RingLink):
                link.waiting = partial(self.stopwatch, RING)
        self._unwatched: Tensor | None = None  # the loss of a step until the guard has seen it
        self.is_main, self.tensor_group, self.data_group = mesh.rank == 0, mesh.tensor.group, mesh.data_context.group
        self.micro_batches = config.train.global_batch // (config.train.micro_batch * mesh.data.size)
        p = config.parallel
        self.stepwise = p.zero_stage >= 2  # ZeRO reduces in every backward pass, driven by its own engine
        self.autocast = "bf16" if config.train.precision == "bf16" and not p.zero_stage else "fp32"
        # ZeRO averages over DP x CP, where this project sums.
        self.averaged = mesh.data_context.size if p.zero_stage else 1

    def count(self, batches: Sequence) -> int:
        own = sum(count_targets(batch) for batch in batches)
        return self._agree(own) // self.mesh.model.size  # the ranks of a model read the same batches

    def forward_backward(self, batches: Sequence, targets: int) -> Tensor:
        scale = self.averaged / targets
        with self.stopwatch(PASSES), compute_dtype(self.mesh.device, self.autocast):
            if self.pipeline is not None:
                total = self.pipeline.forward_backward(
                    [on_device(b, self.config, self.mesh.device) for b in batches], scale
                )
            else:
                total = self._forward_backward(batches, scale)
            for module in self.modules:
                if hasattr(module, "link"):
                    module.link.flush()
        return self._sum(total / self.averaged if self._reports else 0.0)

    def _forward_backward(self, batches: Sequence, scale: float) -> Tensor | float:
        total, inflight = 0.0, self.config.parallel.inflight
        for start in range(0, len(batches), inflight):
            losses = []
            for batch in batches[start : start + inflight]:
                losses.append(self._call(on_device(batch, self.config, self.mesh.device)).sum() * scale)
            while losses:
                loss = losses.pop()
                total += loss.detach()
                if not self.stepwise:
                    loss.backward()
                    continue
                more = bool(losses) or start + inflight < len(batches)
                self.zero.set_gradient_accumulation_boundary(not more)  # steps may differ in how many there are
                self.zero.backward(loss, scale_wrt_gas=False)
                if more:
                    self.zero.step()  # not at a boundary: counts the micro-batch only
        return total

    def _call(self, batch: dict) -> Tensor:
        """The sum of the labels' losses, [1]."""
        assert self.modules[0].last, "a stage that is not the last one gives activations, not losses"
        module = self.zero if self.stepwise else self.modules[0]
        return module(batch["tokens"], positions=batch["positions"], labels=batch["labels"])

    def update(self, rate: float, loss: Tensor) -> Tensor:
        self.reduce_gradients()
        return self.step(rate, loss)

    def reduce_gradients(self) -> None:
        """Sums gradients over data and context ranks, and those of a tied embedding over its two stages."""
        if self.stepwise:
            return  # done in the backward passes
        with self.stopwatch(MEETING):
            sum_tied_gradients(self.model, self.mesh.pipeline)
            if self.zero is not None:
                self.zero.allreduce_gradients()
            elif self.mesh.data_context.size > 1:
                gradients = []
                for p in self.model.parameters():
                    if p.requires_grad:
                        p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # alike on every rank
                        gradients.append(p.grad)
                all_reduce_in_buckets(gradients, self.mesh.data_context.group)

    def step(self, rate: float, loss: Tensor) -> Tensor:
        """Clips and updates, after reduce_gradients. Returns the norm before clipping."""
        if self.before_step is not None:
            self.before_step()
        set_learning_rate(self._torch_optimizer, rate)
        if self.zero is not None:
            self._unwatched = loss
            self.zero.step()
            norm = torch.as_tensor(self.zero.get_global_grad_norm(), device=self.mesh.device)
            if self._unwatched is not None:  # DeepSpeed itself found the norm not finite, and made no update
                self.guard.watch(loss, norm)
            return norm
        largest = self.config.train.grad_clip or math.inf
        norm = clip_by_global_norm(self.model.named_parameters(), self.mesh, largest, self.config.model.tie_embeddings)
        self.guard.watch(loss, norm)
        with self.stopwatch(PASSES):
            self._torch_optimizer.step()
        self._torch_optimizer.zero_grad()
        return norm

    def group_squares(self) -> Tensor:
        tied = self.config.model.tie_embeddings
        own = (found for found in self._whole_tensors() if is_counted(found[0], found[-1], self.mesh, tied))
        squares = sum_squares((found[:3] for found in own), self.mesh.device)
        if self.mesh.model.size > 1:
            dist.all_reduce(squares, group=self.mesh.model.group)
        return squares

    def _whole_tensors(self) -> Iterator[tuple[str, Tensor | None, Tensor, Tensor]]:
        """(name, gradient, weight, parameter), as they are before ZeRO cuts them. Collective over its ranks."""
        if self.zero is not None:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
        for name, p in self.model.named_parameters():
            if self.zero is None or not p.requires_grad:
                yield name, p.grad, p, p
            else:
                weight = safe_get_full_fp32_param(p)
                assert weight is not None, f"{name} is no parameter of ZeRO's"
                yield name, safe_get_full_grad(p), weight, p

    def _watch_zero(self, *_) -> None:
        """Before ZeRO's updates, which come one for each group of parameters: by then it has the norm."""
        if self._unwatched is not None:
            self.guard.watch(self._unwatched, torch.as_tensor(self.zero.optimizer._global_grad_norm))
            self._unwatched = None

    def evaluate(self, batches: Sequence) -> float:
        inputs = [on_device(batch, self.config, self.mesh.device) for batch in batches]
        with torch.no_grad(), self.stopwatch.off(), compute_dtype(self.mesh.device, self.autocast):
            if self.pipeline is not None:
                total = self.pipeline.evaluate(inputs)
            else:
                total = sum(self._call(x).sum() for x in inputs)
            return float(self._sum(total if self._reports else 0.0))

    def any(self, flag: bool) -> bool:
        return self._agree(int(flag)) > 0

    @property
    def _reports(self) -> bool:
        """Whether this rank's loss counts: it is at the last stage, and the first of its tensor-parallel group."""
        return self.mesh.tensor.rank == 0 and self.mesh.pipeline.rank == self.mesh.pipeline.size - 1

    def _sum(self, value: Tensor | float) -> Tensor:
        """Over all ranks, in float64, on the device."""
        total = torch.as_tensor(value, device=self.mesh.device).to(torch.float64)
        if self.mesh.world > 1:
            with self.stopwatch(MEETING):
                dist.all_reduce(total)
        return total

    def _agree(self, value: int) -> int:
        """The sum over all ranks of what their hosts know."""
        total = torch.tensor(value)
        if self.mesh.world > 1:
            with self.stopwatch(MEETING):
                dist.all_reduce(total, group=self.mesh.hosts)
        return int(total)
