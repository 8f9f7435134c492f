"""The process mesh: world = DP x CP x TP x PP, its groups, and every check of a layout in one place.

Ranks are numbered as megatron-core does, tensor parallel fastest: rank = tp + TP * (cp + CP * (dp + DP * pp)).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from titans_pretrain.config import Config
from titans_pretrain.parallel.launch import launched_world, start_processes
from titans_pretrain.parallel.megatron import load_megatron
from titans_pretrain.parallel.tensor import check_tensor_parallel


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh as this rank sees it; `group` is None in a run of one process."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    ranks: tuple[int, ...] = (0,)  # global ranks, in this axis' order


@dataclass(frozen=True)
class Mesh:
    device: torch.device
    rank: int = 0
    world: int = 1
    data: Axis = Axis()
    context: Axis = Axis()
    tensor: Axis = Axis()
    pipeline: Axis = Axis()
    data_context: Axis = Axis()  # DP x CP: what gradients are summed over and ZeRO partitions over
    model: Axis = Axis()  # TP x PP: what one copy of the model is spread over


def check_layout(config: Config, world: int) -> int:
    """The data-parallel degree of `world` processes. Raises ValueError, naming the numbers and a layout that would work."""
    p, train = config.parallel, config.train
    model = p.tp * p.cp * p.pp
    if world % model:
        raise ValueError(
            f"{world} processes do not divide into parallel.tp={p.tp} * parallel.cp={p.cp} * parallel.pp={p.pp} = {model}; "
            f"start {-(-world // model) * model} processes, or choose degrees whose product divides {world}"
        )
    dp = world // model
    rows = train.micro_batch * dp
    if train.global_batch % rows:
        raise ValueError(
            f"train.global_batch={train.global_batch} must be a multiple of train.micro_batch={train.micro_batch} * {dp} "
            f"data-parallel processes = {rows}; try train.global_batch={-(-train.global_batch // rows) * rows}"
        )
    micro_batches = train.global_batch // rows
    check_tensor_parallel(config.model, p.tp, p.sequence_parallel, p.memory_split)
    if p.sequence_parallel and (config.data.seq_len // p.segments) % p.tp:
        raise ValueError(
            f"parallel.sequence_parallel needs segments of a multiple of parallel.tp={p.tp} tokens, got "
            f"data.seq_len={config.data.seq_len} in {p.segments} segments"
        )
    stages = p.pp * p.stages_per_rank
    if stages > config.model.layers:
        raise ValueError(
            f"model.layers={config.model.layers} is fewer than {stages} pipeline stages (parallel.pp={p.pp} * "
            f"parallel.stages_per_rank={p.stages_per_rank}); lower parallel.pp to {config.model.layers} or less"
        )
    if p.pp > 1 and micro_batches < p.pp:
        raise ValueError(
            f"parallel.pp={p.pp} needs as many micro-batches in a step, got {micro_batches}: "
            f"try train.global_batch={rows * p.pp}"
        )
    rounds = max(1, micro_batches // p.pp)
    if p.pipeline_schedule == "interleaved" and micro_batches % rounds:
        raise ValueError(
            f"parallel.pipeline_schedule=interleaved needs micro-batches in {rounds} equal rounds, got {micro_batches}: "
            f"try train.global_batch={rows * rounds * p.pp}"
        )
    if p.inflight > 1 and (p.cp == 1 or p.pp > 1):
        raise ValueError(
            f"parallel.inflight={p.inflight} fills a context-parallel ring: it needs parallel.cp > 1 and "
            "parallel.pp=1 (a pipeline's schedule says itself what is in flight)"
        )
    _check_zero(config)
    return dp


def _check_zero(config: Config) -> None:
    p = config.parallel
    if config.deepspeed and not p.zero_stage:
        raise ValueError(
            f"deepspeed.{next(iter(config.deepspeed))} is set, but parallel.zero_stage=0 runs without DeepSpeed: set "
            "parallel.zero_stage=1, 2 or 3, or remove the deepspeed block"
        )
    if p.zero_stage:
        from titans_pretrain.parallel.zero import zero_settings

        zero_settings(config, 1)
    if p.zero_stage > 1 and p.pp > 1:
        raise ValueError(
            f"parallel.zero_stage={p.zero_stage} with parallel.pp={p.pp}: a pipeline accumulates gradients over its "
            "micro-batches, which stages 2 and 3 would reduce one by one; use parallel.zero_stage=1"
        )
    if p.zero_stage == 3 and (p.segments > 1 or config.train.recompute == "segment"):
        raise ValueError(
            "parallel.zero_stage=3 cannot run sequences in segments (parallel.cp > 1, parallel.segments_per_rank > 1 or "
            "train.recompute=segment): it gathers parameters inside the layer loop, where the ranks of a ring are at "
            "different layers; use parallel.zero_stage=2"
        )


def build_mesh(config: Config, device: torch.device) -> Mesh:
    """Joins this process to the others and makes the groups. Call once per process, on all of them alike."""
    world = launched_world()
    check_layout(config, world)
    if world == 1 and not config.parallel.zero_stage:
        return Mesh(device)
    load_megatron()
    from megatron.core import parallel_state as ps

    if not dist.is_initialized():
        start_processes(device, config.parallel.timeout_minutes)
    p = config.parallel
    ps.initialize_model_parallel(
        p.tp,
        p.pp,
        context_parallel_size=p.cp,
        distributed_timeout_minutes=max(1, round(p.timeout_minutes)),
        create_gloo_process_groups=False,  # second ones, for Megatron's own optimizer
    )
    return Mesh(
        device,
        dist.get_rank(),
        world,
        data=_axis(ps.get_data_parallel_group()),
        context=_axis(ps.get_context_parallel_group()),
        tensor=_axis(ps.get_tensor_model_parallel_group()),
        pipeline=_axis(ps.get_pipeline_model_parallel_group()),
        data_context=_axis(ps.get_data_parallel_group(with_context_parallel=True)),
        model=_axis(ps.get_model_parallel_group()),
    )


def describe(mesh: Mesh) -> str:
    """ "dp 2, tp 4": the degrees above 1."""
    axes = {"dp": mesh.data, "cp": mesh.context, "tp": mesh.tensor, "pp": mesh.pipeline}
    return ", ".join(f"{name} {axis.size}" for name, axis in axes.items() if axis.size > 1)


def leave_mesh() -> None:
    """Takes the groups down, so that this process can build another mesh."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state as ps

    ps.destroy_model_parallel()  # forgets its groups, and leaves their threads
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _axis(group: dist.ProcessGroup) -> Axis:
    ranks = tuple(dist.get_process_group_ranks(group))
    return Axis(ranks.index(dist.get_rank()), len(ranks), group, ranks)
