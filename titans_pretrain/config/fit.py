"""Settings of a short training towards a measured task: forecasting, classification. Standard library only."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from titans_pretrain.config.check import at_least, check_fields, setting


@dataclass
class FitConfig:
    """AdamW with a linear warm-up and half a cosine; the weights kept are those with the best validation."""

    steps: int = setting(1000, "optimizer steps, at most")
    batch: int = setting(128, "examples in one step")
    seed: int = setting(0, "of the initial weights and the order of the examples")
    lr: float = setting(1e-3, "peak learning rate")
    min_lr: float = setting(1e-5, "learning rate of the last step")
    warmup_steps: int = setting(50, "linear warm-up, from lr / warmup_steps")
    weight_decay: float = setting(0.1, "of matrices that multiply activations, and of nothing else")
    beta1: float = setting(0.9, "of AdamW")
    beta2: float = setting(0.95, "of AdamW")
    eps: float = setting(1e-8, "of AdamW")
    grad_clip: float = setting(1.0, "largest global gradient norm; 0: no clipping")
    schedule: ClassVar[str] = "cosine"  # as training/optimizer.py reads it
    optimizer: ClassVar[str] = "adamw"  # likewise
    ema: ClassVar[float] = 0.0
    decay_steps: ClassVar[int] = 0
    precision: Literal["fp32", "bf16"] = setting("fp32", "bf16: autocast over float32 parameters")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes a GPU if there is one")
    eval_every: int = setting(100, "steps between validations; the last step has one too")
    patience: int = setting(0, "validations without a better one before the training ends; 0: it does all steps")
    log_every: int = setting(10, "steps between printed lines; metrics.jsonl has every step")

    def __post_init__(self):
        check_fields(self, "train")
        for name in ("steps", "batch", "eval_every", "log_every"):
            at_least("train." + name, getattr(self, name), 1)
        for name in ("seed", "lr", "min_lr", "warmup_steps", "weight_decay", "eps", "grad_clip", "patience"):
            at_least("train." + name, getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.min_lr > self.lr:
            raise ValueError(f"train.min_lr={self.min_lr} is above train.lr={self.lr}; lower it")


@dataclass
class FolderConfig:
    name: str | None = setting(None, "null: the name of the config file")
    dir: str | None = setting(None, "the run folder; null: runs/NAME")

    def __post_init__(self):
        check_fields(self, "run")
