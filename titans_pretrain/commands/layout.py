"""What a layout gives each process: stages, segments, the traffic of the ring, and bytes of memory."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from titans_pretrain.config import Config
from titans_pretrain.config.model import LayerConfig
from titans_pretrain.kernels.memory_scan.chunked.spans import spans_of
from titans_pretrain.models import TitansForCausalLM, build_model
from titans_pretrain.models.state import tensors
from titans_pretrain.parallel.layout import check_layout, needs_segments, stage_layers
from titans_pretrain.parallel.segments import state_template
from titans_pretrain.parallel.stage import stage_parts

# Bytes kept for the backward pass per token and model dimension, besides the feed-forward part and the memory's states:
# (fp32, bf16), counted with saved-tensor hooks (tests/integration/test_plan.py holds them to that).
_KEPT = {"transformer": (40, 36), "lmm": (100, 95), "mal": (128, 119), "mag": (140, 135), "mac": (275, 245)}
_KEPT_FFN = (16, 9.5)  # likewise, per token and hidden dimension of the feed-forward part


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
        """Of a data-parallel rank in a step."""
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
        stages = self.stages[pipeline_rank :: self.config.parallel.pp]
        parts = {part for layers in stages for part in stage_parts(self.config.model, layers)}
        return sum(p.numel() for part in parts for p in self.model.get_submodule(part).parameters())

    def memory(self, pipeline_rank: int) -> dict[str, float]:
        """Bytes of a process; see state_bytes and activation_bytes."""
        held = state_bytes(self.config, self.parameters(pipeline_rank), self.dp)
        return held | {"activations": activation_bytes(self, pipeline_rank)}

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
    with torch.device("meta"):
        model = build_model(config.model)
    if p.tp > 1:
        from titans_pretrain.parallel.tensor import shard_tensors

        with _pretended_ranks(p.tp):
            shard_tensors(model, sequence_parallel=p.sequence_parallel, memory_split=p.memory_split)
    return Layout(config, dp, model)


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


def state_bytes(config: Config, parameters: int, dp: int) -> dict[str, float]:
    """Bytes of one process for its parameters, their gradients, and what the optimizer keeps: Adam's two moments and, with ZeRO,
    float32 masters. ZeRO partitions over DP x CP."""
    p, ranks = config.parallel, dp * config.parallel.cp
    size = 2 if config.train.precision == "bf16" and p.zero_stage else 4
    gradients = parameters * (size / ranks if p.zero_stage >= 2 else 4)
    if needs_segments(config):
        gradients += parameters * size  # a walk collects those of all its segments before it hands them over
    optimizer = "optimizer, in CPU memory" if p.offload_optimizer else "optimizer"
    return {
        "parameters": parameters * size / (ranks if p.zero_stage == 3 else 1),
        "gradients": gradients,
        optimizer: parameters * (12 / ranks if p.zero_stage else 8),
    }


def activation_bytes(layout: Layout, pipeline_rank: int = 0) -> float:
    """Bytes that a process holds at most for its backward passes, estimated. Of what tensor parallelism saves, only the
    feed-forward part and the memory's states are counted, unless parallel.sequence_parallel splits all of it."""
    stages = [_stage_bytes(layout, stage) for stage in layout.stages[pipeline_rank :: layout.config.parallel.pp]]
    kept, again = max(stages, key=sum)
    return _passes_at_once(layout, pipeline_rank) * kept + again


def _stage_bytes(layout: Layout, layers: range) -> tuple[float, float]:
    """What one forward pass of a stage keeps, and what its backward pass adds where it runs something again."""
    config, p, train = layout.config, layout.config.parallel, layout.config.train
    tokens = train.micro_batch * config.data.seq_len // p.cp
    segments = p.segments_per_rank if needs_segments(config) else 1
    inputs = tokens * config.model.dim * 4
    states = segments * sum(layout.payload(i, p.segments - 1) for i in layers) if p.segments > 1 else 0
    if train.recompute == "none":
        return sum(_block_bytes(layout, i, tokens) for i in layers), 0
    blocks = [_block_bytes(layout, i, tokens // segments) for i in layers]
    if train.recompute == "block":
        return len(layers) * inputs + states, max(blocks)
    return inputs + states, sum(blocks)


def _passes_at_once(layout: Layout, pipeline_rank: int) -> int:
    """Forward passes of a stage whose backward pass is still to come."""
    p, all_passes = layout.config.parallel, layout.micro_batches * layout.config.parallel.stages_per_rank
    if p.pp == 1:
        return min(all_passes, p.inflight)
    behind = p.pp - 1 - pipeline_rank
    if p.pipeline_schedule == "interleaved":
        return min(all_passes, 2 * behind + (p.stages_per_rank - 1) * p.pp + 1)
    return min(all_passes, behind + 1)


def _block_bytes(layout: Layout, layer: int, tokens: int) -> float:
    """What one block keeps of so many tokens (all rows of a micro-batch together)."""
    c, p, train = layout.model.layers[layer].config, layout.config.parallel, layout.config.train
    bf16 = train.precision == "bf16"
    kept = _kept(c)[bf16] * c.dim / (p.tp if p.sequence_parallel else 1) + _KEPT_FFN[bf16] * c.ffn_dim / p.tp
    total = tokens * kept
    if c.has_memory:
        weights = sum(w.numel() for w in layout.model.layers[layer].memory.weights)
        # The scan saves the state that enters each span but the first.
        spans = spans_of(tokens // train.micro_batch, c.memory.chunk_size, 0, c.memory.checkpoint_every)
        total += train.micro_batch * (len(spans) - 1) * 2 * weights * 4
    return total


def _kept(c: LayerConfig) -> tuple[float, float]:
    """_KEPT of the variant; of one that was not counted, the sum over what it is made of."""
    parts = [_KEPT[name] for name, there in (("lmm", c.has_memory), ("transformer", c.has_attention)) if there]
    return _KEPT.get(c.variant) or (sum(p[0] for p in parts), sum(p[1] for p in parts))
