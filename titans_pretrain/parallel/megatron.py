"""megatron-core as this package uses it: process groups and tensor-parallel layers, on GPUs and on CPUs alike.

megatron-core is written for CUDA. What its groups, layers and mappings need on a CPU is this file and nothing else.
"""

import importlib.util
import logging
import warnings

import torch
import torch.distributed as dist

from titans_pretrain.parallel.groups import group_of

# Of those that it makes for every combination of degrees: what this package uses.
_GROUPS = {
    "DATA_PARALLEL_GROUP", "DATA_PARALLEL_GROUP_WITH_CP", "CONTEXT_PARALLEL_GROUP", "TENSOR_MODEL_PARALLEL_GROUP",
    "PIPELINE_MODEL_PARALLEL_GROUP", "MODEL_PARALLEL_GROUP",
}  # fmt: skip


def require_distributed() -> None:
    """Raises ValueError, with the command that helps, if the `distributed` extra is not installed."""
    missing = []
    for module, package in (("deepspeed", "deepspeed"), ("megatron", "megatron-core")):
        try:
            found = importlib.util.find_spec(module) is not None
        except ValueError:  # sys.modules says that there is none
            found = False
        if not found:
            missing.append(package)
    if missing:
        raise ValueError(
            f"training on several processes needs {' and '.join(missing)}: pip install 'titans-pretrain[distributed]'"
        )


def load_megatron() -> None:
    """Imports megatron-core without its warnings about optional packages, and makes it work on a CPU.

    Its sequence-parallel mappings allocate on torch.cuda.current_device(), which fails without CUDA: there it becomes the CPU.
    It has every rank make every group of the run, five for each process; now a rank makes its own.
    Its linear layers add an entry `_extra_state: None` to state_dict(), which no checkpoint should hold.
    """
    require_distributed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    logging.getLogger("megatron").setLevel(logging.ERROR)
    parallel_state.create_group = _create_group
    for layer in (ColumnParallelLinear, RowParallelLinear):
        layer.get_extra_state = torch.nn.Module.get_extra_state
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")


def _create_group(ranks=None, timeout=None, group_desc=None, **_) -> dist.ProcessGroup | None:
    wanted = group_desc in _GROUPS and dist.get_rank() in ranks
    return group_of(ranks, timeout=timeout) if wanted else None
