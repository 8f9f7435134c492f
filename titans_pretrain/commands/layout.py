"""What a layout gives each process: stages, segments, the traffic of the ring, and bytes of memory."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import nn

from titans_pretrain.commands.activations import Steps, activation_bytes, count_steps
from titans_pretrain.config import Config
from titans_pretrain.models import TitansForCausalLM, build_model
from titans_pretrain.models.state import tensors
from titans_pretrain.parallel.layout import check_layout, needs_segments, stage_layers
from titans_pretrain.parallel.segments import state_template
from titans_pretrain.parallel.stage import stage_parts
from titans_pretrain.training.optimizer import is_muons

_known_steps: dict[str, Steps] = {}


@dataclass(frozen=True)
class Layout:
    """The degrees of a run, and the model as one tensor-parallel rank has it, on the meta device."""

    config: Config
    dp: int
    model: TitansForCausalLM

    @property
    def world(self) -> int:
        p = self.config.parallel
        return self.dp * p.cp * p.tp * p.pp

    @property
    def micro_batches(self) -> int:
        """Of a data-parallel rank in a step, after train.batch_warmup."""
        return self.config.train.global_batch // (self.config.train.micro_batch * self.dp)

    @property
    def segment_tokens(self) -> int:
        return self.config.data.seq_len // self.config.parallel.segments

    @property
    def stages(self) -> list[range]:
        """The layers of all stages; pipeline rank r has stages r, r + PP, ..."""
        p = self.config.parallel
        return stage_layers(self.config.model, p.pp * p.stages_per_rank, self.config.data.seq_len)

    def payload(self, layer: int, boundary: int) -> int:
        """Bytes of a layer's state where segment `boundary` starts: what a message of the ring holds."""
        bf16 = self.config.train.precision == "bf16"
        template = state_template(
            self.model.layers[layer], self.config.train.micro_batch, boundary * self.segment_tokens,
            torch.bfloat16 if bf16 else torch.float32,
        )  # fmt: skip
        return sum(t.nbytes for t in tensors(template))

    def ring_bytes(self, context_rank: int, pipeline_rank: int) -> int:
        """What a process sends in one micro-batch: states to the right, their gradients to the left (if none is truncated)."""
        p = self.config.parallel
        layers = [layer for stage in self.stages[pipeline_rank :: p.pp] for layer in stage]
        right = range(context_rank + 1, p.segments, p.cp)
        left = range(context_rank or p.cp, p.segments, p.cp)
        return sum(self.payload(layer, boundary) for layer in layers for boundary in (*right, *left))

    def parameters(self, pipeline_rank: int) -> int:
        """Of one process, before ZeRO partitions them."""
        return sum(p.numel() for _, p in self._named(pipeline_rank))

    def matrices(self, pipeline_rank: int) -> int:
        """Those of the parameters that Muon updates, where it does."""
        if self.config.train.optimizer != "muon":
            return 0
        return sum(p.numel() for name, p in self._named(pipeline_rank) if is_muons(name, p))

    def _named(self, pipeline_rank: int) -> Iterator[tuple[str, nn.Parameter]]:
        stages = self.stages[pipeline_rank :: self.config.parallel.pp]
        for part in {part for layers in stages for part in stage_parts(self.config.model, layers)}:
            yield from self.model.get_submodule(part).named_parameters(prefix=part)

    def memory(self, pipeline_rank: int) -> dict[str, float]:
        """Bytes of a process; see state_bytes and activations.py."""
        held = state_bytes(self.config, self.parameters(pipeline_rank), self.dp, self.matrices(pipeline_rank))
        return held | {"activations": self.activations(pipeline_rank)}

    def activations(self, pipeline_rank: int = 0) -> float:
        """Bytes that a process holds at most for its backward passes and beside them."""
        stages = self.stages[pipeline_rank :: self.config.parallel.pp]
        in_flight = self.passes_at_once(pipeline_rank)
        return activation_bytes(self.config, self._steps, stages, self.micro_batches, in_flight)

    def passes_at_once(self, pipeline_rank: int) -> int:
        """Forward passes of the rank's stages whose backward pass is still to come."""
        p = self.config.parallel
        passes, behind = self.micro_batches * p.stages_per_rank, p.pp - 1 - pipeline_rank
        if p.pp == 1:
            return min(passes, p.inflight)
        if p.pipeline_schedule == "interleaved":
            return min(passes, 2 * behind + (p.stages_per_rank - 1) * p.pp + 1)
        return min(passes, behind + 1)

    @cached_property
    def _steps(self) -> Steps:
        """Counted once in a process for all layouts that differ in what no step depends on."""
        c = self.config
        steps_of = c.model, c.data.seq_len, c.train.micro_batch, c.train.precision, needs_segments(c)
        key = repr((*steps_of, replace(c.parallel, zero_stage=min(1, c.parallel.zero_stage), inflight=1)))
        if key not in _known_steps:
            with one_rank(c) as model:
                _known_steps[key] = count_steps(c, model)
        return _known_steps[key]

    @property
    def fullest(self) -> int:
        """The pipeline rank that needs the most memory."""
        return max(range(self.config.parallel.pp), key=lambda rank: sum(self.memory(rank).values()))


def build_layout(config: Config, processes: int | None = None) -> Layout:
    """processes: of the whole run; None: as few as the degrees allow. Raises ValueError as a run on so many would."""
    p = config.parallel
    if processes is not None and processes < 1:
        raise ValueError(f"--processes must be 1 or more, got {processes}")
    dp = check_layout(config, processes or p.tp * p.cp * p.pp)
    with one_rank(config) as model:
        return Layout(config, dp, model)


def needed_memory(config: Config, processes: int | None) -> dict[str, float]:
    """Bytes of the process that needs most, by part, at the row length of a run that needs most."""
    found = []
    for length in config.data.lengths:
        layout = build_layout(with_rows_of(config, length), processes)
        found.append(layout.memory(layout.fullest))
    return max(found, key=lambda parts: sum(parts.values()))


def with_rows_of(config: Config, length: int) -> Config:
    """The config of a run whose rows all have the length that data.seq_len_warmup gives them for a while."""
    data, train, n = config.data, config.train, config.data.seq_len // length
    return replace(
        config,
        data=replace(data, seq_len=length, seq_len_warmup=[]),
        train=replace(train, micro_batch=train.micro_batch * n, global_batch=train.global_batch * n, batch_warmup=[]),
    )


@contextlib.contextmanager
def one_rank(config: Config) -> Iterator[TitansForCausalLM]:
    """The model as one tensor-parallel rank has it, on the meta device; inside, it runs there as among the others."""
    p = config.parallel
    with torch.device("meta"):
        model = build_model(config.model)
    if p.tp == 1:
        yield model
        return
    from titans_pretrain.parallel.tensor import shard_tensors

    with _pretended_ranks(p.tp):
        shard_tensors(model, sequence_parallel=p.sequence_parallel, memory_split=p.memory_split)
        yield model


@contextlib.contextmanager
def _pretended_ranks(tp: int) -> Iterator[None]:
    """This process as the first of a tensor-parallel group whose other ranks do not exist."""
    from titans_pretrain.parallel.megatron import load_megatron

    load_megatron()
    from megatron.core import parallel_state as ps

    dist.init_process_group("fake", rank=0, world_size=tp)
    try:
        ps.initialize_model_parallel(tp, create_gloo_process_groups=False)  # of a pretended backend
        yield
    finally:
        ps.destroy_model_parallel()
        dist.destroy_process_group()


def ring_efficiency(layers: int, ranks: int, segments: int, inflight: int) -> float:
    """Share of the time in which the ranks of a ring compute, if a layer takes all of them equally long: L layers, P ranks,
    k segments on each, m micro-batches in flight. For L >= P this is mkL / (mkL + P - 1); below, a rank waits P - L layers
    before each segment but its first."""
    work = inflight * segments * layers
    waits = inflight * (segments - 1) * max(0, ranks - layers) + ranks - 1
    return work / (work + waits)


def state_bytes(config: Config, parameters: int, dp: int, matrices: int = 0) -> dict[str, float]:
    """Bytes of one process for its parameters, their gradients, and what the optimizer keeps: Adam's two moments or, of so many in
    matrices, Muon's one, an average of the weights and, with ZeRO, float32 masters. ZeRO partitions over DP x CP."""
    p, ranks = config.parallel, dp * config.parallel.cp
    size = 2 if config.train.precision == "bf16" and p.zero_stage else 4
    gradients = parameters * (size / ranks if p.zero_stage >= 2 else 4)
    if needs_segments(config):
        gradients += parameters * size  # a walk collects those of all its segments before it hands them over
    kept = 2 + (p.zero_stage > 0) + (config.train.ema > 0)
    optimizer = "optimizer, in CPU memory" if p.offload_optimizer else "optimizer"
    return {
        "parameters": parameters * size / (ranks if p.zero_stage == 3 else 1),
        "gradients": gradients,
        optimizer: 4 * (parameters * kept - matrices) / (ranks if p.zero_stage else 1),
    }
