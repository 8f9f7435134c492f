"""The process mesh: world = DP x CP x TP x PP, and its groups. layout.py has the rules.

Ranks are numbered as megatron-core does, tensor parallel fastest: rank = tp + TP * (cp + CP * (dp + DP * pp)).
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from titans_pretrain.config import Config
from titans_pretrain.parallel.groups import destroy_other_groups
from titans_pretrain.parallel.launch import launched_world, start_processes
from titans_pretrain.parallel.layout import check_layout
from titans_pretrain.parallel.megatron import load_megatron


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
    timeout: timedelta | None = None  # of a transfer
    hosts: dist.ProcessGroup | None = (
        None  # all ranks, for what hosts tell each other while devices work; None: the default group
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
    timeout = timedelta(minutes=p.timeout_minutes)
    hosts = dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" and world > 1 else None
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
        timeout=timeout,
        hosts=hosts,
    )


def describe(mesh: Mesh) -> str:
    """ "dp 2, tp 4": the degrees above 1."""
    axes = {"dp": mesh.data, "cp": mesh.context, "tp": mesh.tensor, "pp": mesh.pipeline}
    return ", ".join(f"{name} {axis.size}" for name, axis in axes.items() if axis.size > 1)


def leave_mesh() -> None:
    """Takes the mesh down, so that this process can build another one."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state as ps

    ps.destroy_model_parallel()  # forgets its groups
    destroy_other_groups()


def _axis(group: dist.ProcessGroup) -> Axis:
    ranks = tuple(dist.get_process_group_ranks(group))
    return Axis(ranks.index(dist.get_rank()), len(ranks), group, ranks)
