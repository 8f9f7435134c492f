"""DeepSpeed's configuration, made of ours; a `deepspeed:` block may add to it and not contradict it."""

from typing import Any

from titans_pretrain.config import Config

# What a key of the `deepspeed:` block must agree with.
_OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "train.optimizer, train.lr, train.beta1, train.beta2, train.weight_decay",
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
