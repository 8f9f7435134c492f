"""A stage: consecutive layers of a model, with its embedding at the first stage and its norm, head and loss at the last.

Without pipeline parallelism the one stage is the whole model. Parameters keep their names in the model, so checkpoints and
optimizers do not see how it was cut.
"""

from typing import Any

import torch
from torch import Tensor, nn

from titans_pretrain.models.causal_lm import TitansForCausalLM
from titans_pretrain.models.rotary import Rotations, rotations


class Stage(nn.Module):
    """stage(x, positions=, labels=) -> hidden [B, T, dim], or at the last stage the sum of the labels' losses as [1].

    x: tokens [B, T] int64 at the first stage, hidden [B, T, dim] at others; positions, labels [B, T] int64 as the model has them.
    """

    embed_tokens: Any  # modules, or None on a stage that has none
    norm: Any
    lm_head: Any

    def __init__(self, model: TitansForCausalLM, layers: range):
        super().__init__()
        self.config = model.config
        self.cross_entropy = model.cross_entropy
        self.first, self.last = layers.start == 0, layers.stop == len(model.layers)
        tied = model.lm_head is None
        self.embed_tokens = model.embed_tokens if self.first or (self.last and tied) else None
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in layers})
        self.norm = model.norm if self.last else None
        self.lm_head = model.lm_head if self.last else None
        self.recompute_blocks = False

    @property
    def head_name(self) -> str:
        return "embed_tokens.weight" if self.lm_head is None else "lm_head.weight"

    @property
    def head_weight(self) -> Tensor:
        return (self.lm_head or self.embed_tokens).weight

    def loss(self, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        """Sum of the labels' losses, [1]. hidden: after the norm; head [vocab_size, dim] (a tensor-parallel rank's rows of it)."""
        total, _ = self.cross_entropy(hidden.flatten(0, 1), head, labels.flatten())
        return total.view(1)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotations:
        dims = (block.config.rotary_dim for block in self.layers.values() if block.config.has_attention)
        return rotations(positions, dims, self.config.rope_theta, torch.promote_types(dtype, torch.float32))

    def forward(self, x: Tensor, *, positions: Tensor, labels: Tensor) -> Tensor:
        if self.first:
            x = self.embed_tokens(x)
        by = self.rotation(positions, x.dtype)
        for block in self.layers.values():
            if self.recompute_blocks and torch.is_grad_enabled():
                x, _ = torch.utils.checkpoint.checkpoint(block, x, None, by, positions, use_reentrant=False)
            else:
                x, _ = block(x, None, by, positions)
        return self.loss(self.norm(x), self.head_weight, labels) if self.last else x


def join_stages(stages: list[Stage]) -> Stage:
    """All of a rank's stages as one module: for names and parameters, not to be called."""
    whole = stages[0]
    if len(stages) == 1:
        return whole
    joined = Stage.__new__(Stage)
    nn.Module.__init__(joined)
    joined.config = whole.config
    joined.embed_tokens = next((s.embed_tokens for s in stages if s.embed_tokens is not None), None)
    joined.layers = nn.ModuleDict({name: block for s in stages for name, block in s.layers.items()})
    joined.norm, joined.lm_head = stages[-1].norm, stages[-1].lm_head
    return joined
