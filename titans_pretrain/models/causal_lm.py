"""A Titans language model: embeddings, blocks of one variant, norm and head."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titans_pretrain.config.model import ModelConfig
from titans_pretrain.kernels.cross_entropy import linear_cross_entropy
from titans_pretrain.models.blocks import LmmBlock, MagBlock, MalBlock, TransformerBlock
from titans_pretrain.models.inputs import check_inputs
from titans_pretrain.models.mac import MacBlock
from titans_pretrain.models.norm import RMSNorm
from titans_pretrain.models.rotary import Rotation, rotation
from titans_pretrain.models.state import LayerState, ModelState, positions_after

BLOCKS = {"lmm": LmmBlock, "mac": MacBlock, "mag": MagBlock, "mal": MalBlock, "transformer": TransformerBlock}
RECOMPUTE = ("none", "block")


@dataclass
class CausalLMOutput:
    state: ModelState
    logits: Tensor | None = None  # [B, T, vocab_size], without labels
    loss: Tensor | None = None  # scalar, with labels


class TitansForCausalLM(nn.Module):
    """A part that is None, a layer among them, was taken away: another process has it, and runs it (parallel/stage.py)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(BLOCKS[config.variant](config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.recompute = "none"
        self.cross_entropy = linear_cross_entropy  # replaced where the vocabulary is sharded
        self._init_weights()

    def _init_weights(self) -> None:
        """Projections N(0, init_std), those that write to the residual stream smaller by sqrt(2 * layers), as in GPT-2."""
        std = self.config.init_std
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                last = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=std / (2 * self.config.layers) ** 0.5 if last else std)

    def set_recompute(self, mode: str) -> None:
        """ "block": drop each block's activations and recompute them in the backward pass; "none": keep them."""
        if mode not in RECOMPUTE:
            raise ValueError(f"recompute={mode!r} is not one of {', '.join(RECOMPUTE)}")
        self.recompute = mode

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        state: ModelState | None = None,
        positions: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutput:
        """Read T tokens.

        tokens [B, T] int64. labels [B, T], aligned: labels[t] is the target of position t, -100 none. positions [B, T] of each
        token in its document: 0 starts one (memory, attention and convolutions start afresh), -1 is inert padding; a 0 stands
        at multiples of config.document_multiple only. None: one document, going on from `state`, which must not end in padding.
        num_items_in_batch normalises the loss; None: the number of labels of this call.

        Returns logits or, given labels, the loss; and the state after the last token. Raises ValueError, for values (token ids,
        where documents start, a state after padding) on the CPU only: elsewhere looking would make the device wait.
        """
        check_inputs(self.config, tokens, labels, state, positions)
        position = torch.zeros_like(tokens[:, 0]) if state is None else state.position
        absolute = positions
        if absolute is None:
            absolute = position[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed_tokens(tokens)
        by = self.rotation(absolute, x.dtype)
        x, states = self.run_layers(x, by, positions, state and state.layers)
        after = ModelState(states, positions_after(positions, position, tokens.shape[1]))
        if labels is None:
            return CausalLMOutput(after, logits=nn.functional.linear(self.norm(x), self.head))
        total, count = self.loss(x, labels)
        if num_items_in_batch is None:
            num_items_in_batch = count.clamp(min=1)
        return CausalLMOutput(after, loss=total / num_items_in_batch)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """What layers turn queries and keys of these positions [B, T] by; dtype: of the activations."""
        c = self.config
        return rotation(positions, c.rotary_dim, c.rope_theta, torch.promote_types(dtype, torch.float32))

    def run_layers(
        self,
        x: Tensor,
        by: Rotation,
        positions: Tensor | None,
        states: Sequence[LayerState] | None = None,
        layers: range | None = None,
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """The last layer's output [B, T, dim] and every layer's new state. states: of all layers of the model, before; layers:
        which to run, None: all."""
        after = []
        for i in layers or range(len(self.layers)):
            arguments = (x, None if states is None else states[i], by, positions)
            if self.recompute == "block" and torch.is_grad_enabled():
                x, state = checkpoint(self.layers[i], *arguments, use_reentrant=False)
            else:
                x, state = self.layers[i](*arguments)
            after.append(state)
        return x, tuple(after)

    @property
    def head(self) -> Tensor:
        """[vocab_size, dim]"""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight

    def loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the labels' losses and their number, from the last layer's output."""
        return self.cross_entropy(self.norm(x).flatten(0, 1), self.head, labels.flatten())


def build_model(config: ModelConfig) -> TitansForCausalLM:
    """The model of a configuration, freshly initialised from torch's global random state."""
    return TitansForCausalLM(config)
