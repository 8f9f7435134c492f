"""DeepSpeed ZeRO over the mesh: the engine, and the groups it asks for.

ZeRO partitions and averages over DP x CP. Optimizers are built here and passed in: those that DeepSpeed builds from its
configuration compile C++ at start.
"""

import contextlib
import io
import logging
from importlib.metadata import version

import torch
from packaging.version import Version
from torch import nn

from titans_pretrain.config import Config
from titans_pretrain.models.blocks import Block
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.zero_settings import zero_settings

OLDEST_DEEPSPEED = Version("0.19.8")


def load_deepspeed():
    """Imports DeepSpeed, quietly, without the C++ extension that it would compile for CPUs and training never uses.

    Raises ValueError for one that is too old."""
    found = version("deepspeed")
    if Version(found) < OLDEST_DEEPSPEED:
        raise ValueError(
            f"DeepSpeed {found} is installed, and some before {OLDEST_DEEPSPEED} train ZeRO-1 in float32 with wrong gradients, without a "
            f"word: pip install deepspeed=={OLDEST_DEEPSPEED}, or set parallel.zero_stage=0"
        )
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def partition_part(config: Config, mesh: Mesh, part: nn.Module) -> None:
    """Leaves this rank's share of every parameter (stage 3): before the next part is made, not when the model is whole."""
    group = mesh.data_context.group
    load_deepspeed().zero.Init(
        part, data_parallel_group=group, config_dict_or_path=zero_settings(config, 1), mpu=Groups(mesh)
    )


def zero_engine(config: Config, mesh: Mesh, module: nn.Module, optimizer: torch.optim.Optimizer, accumulation: int):
    """A DeepSpeed engine around a module and its optimizer."""
    deepspeed = load_deepspeed()
    settings = zero_settings(config, accumulation)
    if config.parallel.zero_stage == 3:
        # A block reads its parts' weights outside of their calls, and often: gather it as one.
        deepspeed.utils.set_z3_leaf_modules(module, list({type(m) for m in module.modules() if isinstance(m, Block)}))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, mpu=Groups(mesh))
    return engine


class Groups:
    """What DeepSpeed calls an mpu, over the mesh. Context ranks are data ranks to it."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    def get_data_parallel_group(self):
        return self._mesh.data_context.group

    def get_data_parallel_group_ranks(self):
        return list(self._mesh.data_context.ranks)

    def get_data_parallel_world_size(self):
        return self._mesh.data_context.size

    def get_data_parallel_rank(self):
        return self._mesh.data_context.rank

    def get_tensor_model_parallel_group(self):
        return self._mesh.tensor.group

    def get_tensor_model_parallel_world_size(self):
        return self._mesh.tensor.size

    def get_tensor_model_parallel_rank(self):
        return self._mesh.tensor.rank

    def get_tensor_model_parallel_src_rank(self):
        return self._mesh.tensor.ranks[0]

    def get_pipeline_model_parallel_group(self):
        return self._mesh.pipeline.group

    def get_pipeline_model_parallel_world_size(self):
        return self._mesh.pipeline.size

    def get_pipeline_model_parallel_rank(self):
        return self._mesh.pipeline.rank

    def get_model_parallel_group(self):
        """TP x PP: the gradient norm and overflow flags are summed over it."""
        return self._mesh.model.group

    def get_model_parallel_world_size(self):
        return self._mesh.model.size

    def get_model_parallel_rank(self):
        return self._mesh.pipeline.rank * self._mesh.tensor.size + self._mesh.tensor.rank
