"""AdamW with the usual exceptions from weight decay, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from titans_pretrain.config import TrainConfig


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (fused kernels) over the trained parameters in two groups, with and without decay."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if is_decayed(name, parameter) else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True
    )


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices that multiply activations, and to nothing else.

    Not decayed: everything one-dimensional (norms, biases, gate vectors); embeddings and persistent tokens, which are
    vectors looked up, not maps, and whose shrinking norm raises the gradients of the first layers (OLMo 2);
    the memory's initial weights, because the inner loop's gradients grow as they shrink: LN(z) is scale-free, so their
    norm is the inner step size, which decay would raise all through training.
    """
    looked_up = ("embed_tokens", "persistent", "memory_queries", ".memory.weights.")
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO stage 3 leaves a flat share of the whole
    return len(shape) >= 2 and not any(part in f".{name}" for part in looked_up)


def learning_rate(step: int, train: TrainConfig) -> float:
    """Rate of step 1, 2, ..., train.steps: linear warm-up to `lr`, then by `schedule` down to `min_lr` at the last step: half a
    cosine ("cosine"); only in the last `decay_steps`, as 1 - sqrt ("wsd", warm-up, stable, decay: Haegele et al. 2024, section 3);
    or never ("constant")."""
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    start = train.steps - train.decay_steps if train.schedule == "wsd" else train.warmup_steps
    progress = min(1.0, max(0, step - start) / max(1, train.steps - start))
    fallen = {"cosine": 0.5 * (1 - math.cos(math.pi * progress)), "wsd": math.sqrt(progress), "constant": 0.0}
    return train.lr - (train.lr - train.min_lr) * fallen[train.schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
