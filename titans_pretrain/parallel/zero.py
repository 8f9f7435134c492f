"""DeepSpeed ZeRO over the mesh: its settings from ours, and the groups it asks for.

ZeRO partitions and averages over DP x CP. Optimizers are built here and passed in: those that DeepSpeed builds from its
configuration compile C++ at start.
"""

import contextlib
import io
import logging
from typing import Any

import torch

from titans_pretrain.config import Config
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.stage import Stage

# What a key of the `deepspeed:` block must agree with.
_OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "train.lr, train.beta1, train.beta2, train.weight_decay",
    "scheduler": "train.lr, train.min_lr, train.warmup_steps",
    "bf16.enabled": "train.precision",
    "fp16": "train.precision (fp32 or bf16)",
    "torch_autocast": "train.precision",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer": "parallel.offload_optimizer",
    "tensor_parallel": "parallel.tp",
    "pipeline": "parallel.pp",
    "sequence_parallel_size": "parallel.cp",
    "data_types": "train.precision",
    "checkpoint": "the project's own checkpoints",
}


def zero_settings(config: Config, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration. accumulation: backward passes per step that ZeRO sees.

    Raises ValueError for a `deepspeed:` block that contradicts the rest of the config."""
    p, train = config.parallel, config.train
    zero: dict[str, Any] = {"stage": p.zero_stage}
    if p.zero_stage == 1:
        # The gradients come from outside (a ring or a pipeline), reduced once per step.
        zero |= {"contiguous_gradients": False, "overlap_comm": False}
    if p.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if train.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        if p.zero_stage == 1:
            settings["bf16"]["immediate_grad_update"] = True
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(settings, config.deepspeed, ())


def _merge(ours: dict, theirs: dict, at: tuple[str, ...]) -> dict:
    merged = dict(ours)
    for key, value in theirs.items():
        name = ".".join((*at, key))
        if name in _OURS:
            known = ours.get(key)
            if value != known:
                told = "it is not set here" if known is None else f"{known!r} here"
                raise ValueError(f"deepspeed.{name}={value!r} contradicts {_OURS[name]} ({told}); set that instead")
        elif isinstance(value, dict) and isinstance(ours.get(key, {}), dict):
            merged[key] = _merge(ours.get(key, {}), value, (*at, key))
        elif key in ours and ours[key] != value:
            raise ValueError(f"deepspeed.{name}={value!r} cannot be changed: this trainer needs {ours[key]!r}")
        else:
            merged[key] = value
    return merged


def load_deepspeed():
    """Imports DeepSpeed, quietly, without the C++ extension that it would compile for CPUs and training never uses."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def zero_engine(config: Config, mesh: Mesh, module: Stage, optimizer: torch.optim.Optimizer, accumulation: int):
    """A DeepSpeed engine around a module and its optimizer."""
    deepspeed = load_deepspeed()
    settings = zero_settings(config, accumulation)
    if (
        config.parallel.zero_stage == 3
    ):  # a block reads its parts' weights outside of their calls, and often: gather it as one
        deepspeed.utils.set_z3_leaf_modules(module, list({type(block) for block in module.layers.values()}))
    deepspeed.init_distributed(dist_init_required=False)
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
