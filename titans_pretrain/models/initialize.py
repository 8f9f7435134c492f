"""Initial values that depend on a seed and a part's name alone: whoever holds a part of the model, and whichever, gets the same.

A model is made without values (`torch.device("meta")`) and given memory (`to_empty`) and values part by part, whole or by whoever
holds some of the parts. Values are drawn in the dtype and on the kind of device that the parameters have: on CPUs and GPUs
from different generators.
"""

import hashlib
from typing import Any

import torch
from torch import nn


def named_parts(model: nn.Module) -> dict[str, nn.Module]:
    """embed_tokens, layers.0, layers.1, ..., norm, lm_head: those that are there."""
    parts = {}
    for name, module in model.named_children():
        parts |= {f"layers.{i}": block for i, block in module.named_children()} if name == "layers" else {name: module}
    return parts


def initialize(model: nn.Module, seed: int) -> None:
    """Every parameter of a TitansForCausalLM, or of anything that holds parts of one under their names, anew."""
    for name, part in named_parts(model).items():
        initialize_part(part, name, seed)


def initialize_part(part: Any, name: str, seed: int) -> None:
    """part: a module with init_weights(). name: its place in the whole model, as named_parts gives it."""
    device = next(part.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]) >> 1)
        part.init_weights()


def init_children(module: nn.Module) -> None:
    """Calls init_weights() of each module directly inside; who holds bare parameters adds them."""
    children: Any = module.children()
    for child in children:
        child.init_weights()
