"""Pipeline parallelism: the schedule that drives the stages (torch.distributed.pipelining)."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from titans_pretrain.config import Config
from titans_pretrain.parallel.mesh import Mesh


class Pipeline:
    """Drives this rank's stages over the micro-batches of a step."""

    def __init__(self, config: Config, mesh: Mesh, modules: list[nn.Module], micro_batches: int, dtype: torch.dtype):
        """modules: of this rank, stage (v * PP + rank) at place v; called as a Stage is. micro_batches: of a step after all
        warm-ups. dtype: of the residual stream."""
        self._config, self._mesh, self._modules, self._dtype = config, mesh, modules, dtype
        self.first, self.last = mesh.pipeline.rank == 0, mesh.pipeline.rank == mesh.pipeline.size - 1
        self.micro_batches = micro_batches
        self._scale = 1.0
        # Its shapes are fixed: one for training, which warm-ups change, and one for validation, which they do not.
        self._schedule = lru_cache(2)(self._build_schedule)

    def _build_schedule(self, micro_batches: int, rows: int, columns: int):
        """A schedule of so many micro-batches, each [rows, columns]."""
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

        c, p, mesh, axis, dtype = self._config, self._config.parallel, self._mesh, self._mesh.pipeline, self._dtype
        count = axis.size * len(self._modules)
        width = columns // p.tp if p.sequence_parallel else columns

        def stage(v: int, module: nn.Module) -> PipelineStage:
            number = v * axis.size + axis.rank
            tokens = torch.empty(rows, columns, dtype=torch.int64, device="meta")
            # Static shapes; torch 2.13 sends no gradients for a hidden tensor that does not say it wants one.
            hidden = torch.empty(rows, width, c.model.dim, dtype=dtype, device="meta", requires_grad=True)
            loss = torch.empty(1, dtype=torch.promote_types(dtype, torch.float32), device="meta", requires_grad=True)
            x, y = tokens if number == 0 else hidden, loss if number == count - 1 else hidden
            return PipelineStage(module, number, count, mesh.device, input_args=x, output_args=y, group=axis.group)

        stages = [stage(v, module) for v, module in enumerate(self._modules)]

        def loss(output: Tensor, _labels: Tensor) -> Tensor:
            return output.sum() * self._scale

        if p.pipeline_schedule == "interleaved":
            return ScheduleInterleaved1F1B(stages, micro_batches, loss_fn=loss, scale_grads=False)
        return Schedule1F1B(stages[0], micro_batches, loss_fn=loss, scale_grads=False)

    def forward_backward(self, batches: Sequence[dict], scale: float) -> Tensor:
        """All micro-batches, forward and backward. Returns the sum of their scaled losses (0 but at the last stage).

        batches: of one shape, each tokens, labels and positions [rows, columns]."""
        return self._run("step", batches, scale)

    def evaluate(self, batches: Sequence[dict]) -> Tensor:
        """Forward only; the sum of the losses (0 but at the last stage). So many micro-batches as a step has after all warm-ups are
        run at a time, the last ones filled up with rows without a target."""
        empty = batches[0] | {"labels": torch.full_like(batches[0]["labels"], -100)}
        filled = [*batches, *[empty] * (-len(batches) % self.micro_batches)]
        parts = [filled[i : i + self.micro_batches] for i in range(0, len(filled), self.micro_batches)]
        return sum(self._run("eval", part, 1.0) for part in parts)

    def _run(self, way: str, batches: Sequence[dict], scale: float) -> Tensor:
        joined = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
        self._scale = scale
        losses: list[Tensor] = []
        inputs = (joined["tokens"],) if self.first else ()
        target = {"target": joined["labels"], "losses": losses} if self.last else {}
        step = getattr(self._schedule(len(batches), *batches[0]["tokens"].shape), way)
        step(*inputs, positions=joined["positions"], labels=joined["labels"], return_outputs=False, **target)
        return sum((x.detach() for x in losses), torch.zeros((), device=joined["labels"].device))
