"""A Titans language model: embeddings, blocks, norm and head."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titans_pretrain.config.model import ModelConfig
from titans_pretrain.kernels.cross_entropy import linear_cross_entropy
from titans_pretrain.models.initialize import initialize
from titans_pretrain.models.inputs import check_inputs
from titans_pretrain.models.linear import Embedding, Projection
from titans_pretrain.models.norm import RMSNorm
from titans_pretrain.models.rotary import Rotations, rotations
from titans_pretrain.models.state import LayerState, ModelState, positions_after
from titans_pretrain.models.variants import build_block

RECOMPUTE = ("none", "block")


@dataclass
class CausalLMOutput:
    state: ModelState
    logits: Tensor | None = None  # [B, T, vocab_size], without labels
    loss: Tensor | None = None  # scalar, with labels
    hidden_states: tuple[Tensor, ...] | None = None  # of embedding and layers, if asked for; the last one normalised


class Stack:
    """How embedded tokens run through a model's `layers` and `norm`: of every module that has these, and a `config` and `recompute`."""

    def read(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        state: ModelState | None = None,
        seen: list[Tensor] | None = None,
        tokens: int | None = None,
    ) -> tuple[Tensor, ModelState]:
        """x [B, T, dim] -> the norm's output [B, T, dim], and the state after the last token. positions, state: as of
        TitansForCausalLM.forward; seen: gets each layer's output; tokens: T, where x is this process's part of the sequence."""
        tokens = x.shape[1] if tokens is None else tokens
        position = x.new_zeros(len(x), dtype=torch.int64) if state is None else state.position
        absolute = positions
        if absolute is None:
            absolute = position[:, None] + torch.arange(tokens, device=x.device)
        if state is not None and state.ragged:
            assert positions is None and tokens == 1  # check_inputs says it to users
            positions = absolute  # how far back a row reaches
        by = self.rotations(absolute, x.dtype)
        x, states = self.run_layers(x, by, positions, state and state.layers, seen=seen)
        ragged = state is not None and state.ragged
        return self.norm(x), ModelState(states, positions_after(positions, position, tokens), ragged)

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> Rotations:
        """What the layers turn queries and keys of these positions [B, T] by; dtype: of the activations."""
        layers = (layer.config for layer in self.layers if layer is not None)
        dims = (c.rotary_dim for c in layers if c.has_attention)
        return rotations(positions, dims, self.config.rope_theta, torch.promote_types(dtype, torch.float32))

    def run_layers(
        self,
        x: Tensor,
        by: Rotations,
        positions: Tensor | None,
        states: Sequence[LayerState] | None = None,
        layers: range | None = None,
        seen: list[Tensor] | None = None,
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """The last layer's output [B, T, dim] and every layer's new state. states: of all layers of the model, before; layers:
        which to run, None: all; seen: gets each layer's output."""
        after = []
        for i in layers or range(len(self.layers)):
            arguments = (x, None if states is None else states[i], by, positions)
            if self.recompute == "block" and torch.is_grad_enabled():
                x, state = checkpoint(self.layers[i], *arguments, use_reentrant=False)
            else:
                x, state = self.layers[i](*arguments)
            after.append(state)
            if seen is not None:
                seen.append(x)
        return x, tuple(after)


class TitansForCausalLM(Stack, nn.Module):
    """A part that is None, a layer among them, was taken away: another process has it, and runs it (parallel/stage.py)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.dim, config.init_std)
        self.layers = nn.ModuleList(build_block(layer) for layer in config.layer_configs)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else Projection(config.dim, config.vocab_size, config.init_std)
        self.recompute = "none"
        self.cross_entropy = linear_cross_entropy  # replaced where the vocabulary is sharded

    def init_weights(self) -> None:
        """Every parameter anew, from one draw of torch's global random state: projections N(0, init_std), those that write to the
        residual stream smaller by sqrt(2 * layers), as in GPT-2."""
        initialize(self, int(torch.randint(2**63 - 1, (), device="cpu")))

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
        output_hidden_states: bool = False,
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
        embedded = self.embed_tokens(tokens)
        seen: list[Tensor] | None = [] if output_hidden_states else None
        hidden, after = self.read(embedded, positions, state, seen, tokens.shape[1])
        hidden_states = None if seen is None else (embedded, *seen[:-1], hidden)
        if labels is None:
            logits = nn.functional.linear(hidden, self.head)
            return CausalLMOutput(after, logits=logits, hidden_states=hidden_states)
        total, count = self.loss(hidden, labels)
        if num_items_in_batch is None:
            num_items_in_batch = count.clamp(min=1)
        return CausalLMOutput(after, loss=total / num_items_in_batch, hidden_states=hidden_states)

    @property
    def head(self) -> Tensor:
        """[vocab_size, dim]"""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight

    def loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the labels' losses and their number. hidden [B, T, dim]: after the norm."""
        return self.cross_entropy(hidden.flatten(0, 1), self.head, labels.flatten())


def build_model(config: ModelConfig) -> TitansForCausalLM:
    """The model of a configuration, freshly initialised from torch's global random state; on the meta device, without values."""
    device = torch.get_default_device()
    with torch.device("meta"):
        model = TitansForCausalLM(config)
    if device.type != "meta":
        model.to_empty(device=device).init_weights()
    return model
