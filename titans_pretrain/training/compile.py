"""torch.compile of a model's blocks (`train.compile`)."""

import os
import shutil

import torch

from titans_pretrain.models.causal_lm import TitansForCausalLM

# Layers of one kind share their compiled code, but for what differs: shapes, windows, whether gradients are wanted. What goes
# beyond torch's limit of 8 would run uncompiled.
VERSIONS = 64


def compile_blocks(model: TitansForCausalLM, device: torch.device) -> None:
    """Every block that is here, in place: modules, parameters and their names stay. A block is compiled when it is first called, for
    each shape; kernels that compilers do not look into (README.md of kernels/memory_scan) run as they are, between compiled parts.

    Raises ValueError where a CPU's compiler is missing."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"train.compile=true needs a C++ compiler on a CPU, and {compiler} is not found: install g++, set CXX, or set train.compile=false"
        )
    torch._dynamo.config.recompile_limit = max(VERSIONS, torch._dynamo.config.recompile_limit)
    for block in filter(None, model.layers):
        # Not block.compile(): hooks around a block, such as those by which ZeRO gathers its parameters, stay outside.
        block.forward = torch.compile(block.forward, dynamic=False)
