"""Everything that parallelism does to a model, in order."""

from collections.abc import Callable

import torch
from torch import nn

from titans_pretrain.config import Config
from titans_pretrain.models.causal_lm import TitansForCausalLM
from titans_pretrain.models.initialize import initialize_part
from titans_pretrain.parallel.engine import ParallelEngine
from titans_pretrain.parallel.layout import needs_segments, stage_layers
from titans_pretrain.parallel.matrices import FlatMatrices, TensorMatrices
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.pipeline import Pipeline
from titans_pretrain.parallel.ring import LocalLink, RingLink
from titans_pretrain.parallel.segments import SegmentedStage
from titans_pretrain.parallel.stage import Stage, keep_parts, replace_parts, stage_parts
from titans_pretrain.parallel.tensor import shard_outputs, shard_part
from titans_pretrain.parallel.zero import partition_part, zero_engine
from titans_pretrain.training.compile import compile_blocks
from titans_pretrain.training.engine import Engine, SingleEngine
from titans_pretrain.training.muon import Muon
from titans_pretrain.training.optimizer import build_optimizer


def build_engine(config: Config, model: TitansForCausalLM, mesh: Mesh, *, initialise: bool = True) -> Engine:
    """The model as it is on one device, or taken apart where the config asks for anything parallel or in segments.

    model: on the meta device; a part that has values keeps them. It is given values part by part, so that no more than one (a
    layer, the embedding) is ever whole on a rank, the same ones under every layout. initialise: False where a checkpoint's values
    follow: NaN until then."""
    seed = config.train.seed if initialise else None
    if mesh.world > 1 or config.parallel.zero_stage or needs_segments(config):
        return parallelize(model, config, mesh, seed)
    replace_parts(model, lambda name, part: with_values(part, name, seed, mesh.device))
    model.set_recompute(config.train.recompute)
    if config.train.compile:
        compile_blocks(model, mesh.device)
    return SingleEngine(config, model, mesh.device)


def with_values(
    part: nn.Module,
    name: str,
    seed: int | None,
    device: torch.device,
    shard: Callable[[str, nn.Module], nn.Module] = lambda _, part: part,
) -> nn.Module:
    """A part of a model, sharded, on the device instead of the meta device. seed: None: NaN, and of the whole part no page of
    memory is touched. A device that is the meta device gets no values."""
    without, there = next(part.parameters()).is_meta, device.type != "meta"
    if without and there:
        part.to_empty(device="cpu")
        if seed is not None:  # drawn whole: the same values under every layout
            initialize_part(part, name, seed)
    part = shard(name, part)
    if without and there and seed is None:
        for p in part.parameters():
            nn.init.constant_(p, torch.nan)
    return part.to(device)


def parallelize(model: TitansForCausalLM, config: Config, mesh: Mesh, seed: int | None) -> ParallelEngine:
    """A single-device model -> an engine that trains this rank's part of it.

    model: as build_engine has it, alike on every rank; seed: None: NaN; the model is taken apart. The layout was checked by build_mesh."""
    p, train = config.parallel, config.train

    # 1. Pipeline parallelism: this rank's layers, as stages.
    layers = stage_layers(config.model, p.pp * p.stages_per_rank, config.data.seq_len)[mesh.pipeline.rank :: p.pp]
    keep_parts(model, (part for stage in layers for part in stage_parts(config.model, stage)))
    stages = [Stage(model, stage) for stage in layers]

    # 2. Values, and tensor parallelism: this rank's slice of every part.
    dtype = torch.bfloat16 if train.precision == "bf16" and p.zero_stage else None  # ZeRO holds the float32 masters

    def shard(name: str, part: nn.Module) -> nn.Module:
        if mesh.tensor.size > 1:
            part = shard_part(name, part, sequence_parallel=p.sequence_parallel, memory_split=p.memory_split)
        return part if dtype is None else part.to(dtype)

    def own(name: str, part: nn.Module) -> nn.Module:
        part = with_values(part, name, seed, mesh.device, shard)
        if p.zero_stage == 3:
            partition_part(config, mesh, part)
        return part

    replace_parts(model, own)
    if mesh.tensor.size > 1:
        shard_outputs(model)

    # 3. The compiler, over blocks as they are now.
    if train.compile:
        compile_blocks(model, mesh.device)

    # 4. The sequence in segments, over context-parallel ranks or one after the other; what the backward pass recomputes.
    modules: list[nn.Module] = list(stages)
    if needs_segments(config):
        link, every = RingLink(mesh) if mesh.context.size > 1 else LocalLink(), train.truncate_state_gradient_every
        modules = [SegmentedStage(s, link, p.segments_per_rank, train.recompute, every) for s in stages]
    else:
        model.set_recompute(train.recompute)

    # 5. The schedule that drives the stages.
    micro_batches = train.global_batch // (train.micro_batch * mesh.data.size)
    pipeline = None
    if mesh.pipeline.size > 1:
        pipeline = Pipeline(config, mesh, modules, micro_batches, next(model.parameters()).dtype)

    # 6. The optimizer, and ZeRO around it.
    optimizer = build_optimizer(model, train)
    zero = None
    if p.zero_stage:
        if config.model.tie_embeddings and mesh.pipeline.rank == mesh.pipeline.size - 1 > 0:
            model.embed_tokens.weight.ds_pipe_replicated = True  # the first stage's copy counts in norms
        called = modules[0] if p.zero_stage >= 2 else model
        matrices = optimizer.param_groups[0]["params"]  # ZeRO puts its own in their place
        zero = zero_engine(config, mesh, called, optimizer, micro_batches if p.zero_stage >= 2 else 1)
        if isinstance(optimizer, Muon):
            optimizer.directions = FlatMatrices(matrices, mesh.data_context, mesh.tensor)
    elif isinstance(optimizer, Muon):
        optimizer.directions = TensorMatrices(mesh.tensor)
    return ParallelEngine(config, mesh, model, modules, pipeline, optimizer, zero)
