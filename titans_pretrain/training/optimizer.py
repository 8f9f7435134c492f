"""The optimizer, with the usual exceptions from weight decay, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from titans_pretrain.config import TrainConfig
from titans_pretrain.training.ema import average_weights
from titans_pretrain.training.muon import Muon


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (fused kernels) over the trained parameters in two groups, with and without decay; with `train.optimizer` "muon" the
    matrices of `is_muons` go to Muon, as the first group."""
    matrices, decayed, kept = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if train.optimizer == "muon" and is_muons(name, parameter):
            matrices.append(parameter)
        else:
            (decayed if is_decayed(name, parameter) else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    adamw = {"lr": train.lr, "betas": (train.beta1, train.beta2), "eps": train.eps, "fused": True}
    if matrices:
        muon = {"weight_decay": train.weight_decay, "momentum": train.muon_momentum}
        optimizer = Muon(matrices, groups, **muon, **adamw)
    else:
        optimizer = torch.optim.AdamW(groups, **adamw)
    if train.ema:
        average_weights(optimizer, train.ema)
    return optimizer


def is_muons(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon has a parameter, where it is asked for: a decayed matrix from features to features.

    Not the head, whose rows are the tokens'; nor the convolutions and the gates of the memory, which are a few numbers for each
    feature or head: what is orthogonal there means nothing. Nor the memory's initial weights, which nothing decays."""
    others = ("lm_head.", "_conv", "forget_proj.", "momentum_proj.", "lr_proj.")
    return len(parameter.shape) == 2 and is_decayed(name, parameter) and not any(part in name for part in others)


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
