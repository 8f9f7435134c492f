"""What a layer costs: FLOPs of its matrix products for one token."""

import itertools
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from titans_pretrain.config.model import VARIANTS, LayerConfig, ModelConfig
from titans_pretrain.models.variants import build_block


@dataclass(frozen=True)
class LayerFlops:
    """Forward, of one token."""

    linear: float  # in its linear maps
    attention: float  # scores and weighted sum, over the keys that a token sees on average
    scan: float  # read, gradient and update in all memories

    @property
    def forward(self) -> float:
        return self.linear + self.attention + self.scan

    def training(self, recomputed: bool = False) -> float:
        """Of a training step. A backward pass costs twice its forward pass; what runs again in it, once more: always the memory's
        states, and everything where the layer is recomputed."""
        return (3 + recomputed) * (self.linear + self.attention) + (4 + recomputed) * self.scan


def layer_flops(c: LayerConfig, seq_len: int) -> LayerFlops:
    """seq_len: tokens of a sequence, which bound what attention sees."""
    return LayerFlops(
        2 * _linear_weights(c, VARIANTS[c.variant].block),
        attention_flops(c, seq_len) if c.has_attention else 0.0,
        scan_flops(c) if c.has_memory else 0.0,
    )


def layer_cost(c: LayerConfig, seq_len: int = 4096) -> float:
    """What a layer takes of a pipeline stage's time, in training FLOPs of a token."""
    return layer_flops(c, seq_len).training()


def head_cost(c: ModelConfig) -> float:
    """Likewise, of the output layer."""
    return 6 * c.dim * c.vocab_size


@cache
def _linear_weights(c: LayerConfig, _block: str | type) -> int:
    """Of the block as it is built, whatever its variant puts there. (_block: of the cache's key alone.)"""
    with torch.device("meta"):
        block = build_block(c)
    return sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))


def attention_flops(c: LayerConfig, seq_len: int) -> float:
    if c.has_segments:  # causal within the segment, over its tokens and what was retrieved for them
        own = (c.mac.segment + 1) / 2
        visible = own + (c.mac.memory_tokens or own)
    else:
        window = min(c.window or seq_len, seq_len)
        visible = window - window * (window - 1) / (2 * seq_len)
    return 4 * c.heads * c.head_dim * (visible + c.persistent_tokens) + retrieved_flops(c)


def retrieved_flops(c: LayerConfig) -> float:
    """Keys and values of what mac retrieves for each token: linear maps that it runs once more."""
    return 4 * c.dim * c.kv_heads * c.head_dim if c.has_segments and not c.mac.memory_tokens else 0


def scan_flops(c: LayerConfig) -> float:
    """One token's read, gradient and update in all memories of a layer (dual form with chunks of C tokens)."""
    widths = c.memory.widths(c.dim)
    weights = [a * b for a, b in itertools.pairwise(widths)]
    product = 2 * sum(weights)  # one input through one set of weights
    # weights, surprise, and initial weights where forgetting tends to them: their decays differ by token
    read = (3 if c.memory.forget_to == "initial" else 2) * product
    gradient = product + 2 * sum(weights[1:])
    write = 2 * product  # into weights and surprise
    within_chunk = 2 * c.memory.chunk_size * (sum(widths[:-1]) + sum(widths[1:]))
    retrieve = product if c.has_segments else 0
    return c.memory.heads * (read + gradient + write + within_chunk + retrieve)
