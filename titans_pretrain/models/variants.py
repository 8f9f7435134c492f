"""From a layer's configuration to its block."""

import importlib

from titans_pretrain.config.model import VARIANTS, LayerConfig
from titans_pretrain.models.blocks import Block


def build_block(config: LayerConfig) -> Block:
    block = VARIANTS[config.variant].block
    if isinstance(
        block, str
    ):  # imported now, from the folder of this file (in an export, whose files are flat, beside it)
        file, _, name = block.rpartition(".")
        block = getattr(importlib.import_module(__name__.removesuffix("variants") + file), name)
    return block(config)
