"""A Titans language model: embeddings, blocks, norm and head."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titans_pretrain.config.model import ModelConfig
from titans_pretrain.kernels.cross_entropy import linear_cross_entropy
from titans_pretrain.models.initialize import initialize
from titans_pretrain.models.linear import Embedding, Projection
from titans_pretrain.models.norm import RMSNorm
from titans_pretrain.models.rotary import rotations
from titans_pretrain.models.state import LayerState, ModelState, positions_after
from titans_pretrain.models.variants import build_block

RECOMPUTE = ("none", "block")


@dataclass
class CausalLMOutput:
    state: ModelState
    logits: Tensor | None = None  # [B, T, vocab_size], without labels
    loss: Tensor | None = None  # scalar, with labels
    hidden_states: tuple[Tensor, ...] | None = (
        None  # if asked for: of the embedding and each layer, the last one normalised
    )


class TitansForCausalLM(nn.Module):
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
        at multiples of config.document_multiple only. None: one document, going on from `state`.
        num_items_in_batch normalises the loss; None: the number of labels of this call.

        Returns logits or, given labels, the loss; and the state after the last token. Raises ValueError.
        """
        self._check(tokens, labels, state, positions)
        x = self.embed_tokens(tokens)
        position = torch.zeros_like(tokens[:, 0]) if state is None else state.position
        absolute = positions
        if absolute is None:
            absolute = position[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        dims = (block.config.rotary_dim for block in self.layers if block.config.has_attention)
        by = rotations(absolute, dims, self.config.rope_theta, torch.promote_types(x.dtype, torch.float32))
        states, seen = [], [x]
        for i, layer in enumerate(self.layers):
            arguments = (x, None if state is None else state.layers[i], by, positions)
            if self.recompute == "block" and torch.is_grad_enabled():
                x, new = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x, new = layer(*arguments)
            states.append(new)
            if output_hidden_states:
                seen.append(x)
        after = ModelState(tuple(states), positions_after(positions, position, tokens.shape[1]))
        hidden = self.norm(x)
        hidden_states = (*seen[:-1], hidden) if output_hidden_states else None
        head = (self.lm_head or self.embed_tokens).weight
        if labels is None:
            return CausalLMOutput(after, logits=nn.functional.linear(hidden, head), hidden_states=hidden_states)
        total, count = self.cross_entropy(hidden.flatten(0, 1), head, labels.flatten())
        if num_items_in_batch is None:
            num_items_in_batch = count.clamp(min=1)
        return CausalLMOutput(after, loss=total / num_items_in_batch, hidden_states=hidden_states)

    def _check(self, tokens: Tensor, labels: Tensor | None, state: ModelState | None, positions: Tensor | None) -> None:
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or 0 in tokens.shape:
            raise ValueError(f"tokens must be int64 [B, T] with T >= 1, got {tokens.dtype} {tuple(tokens.shape)}")
        for name, x in (("labels", labels), ("positions", positions)):
            if x is not None and (x.shape != tokens.shape or x.dtype != torch.int64):
                raise ValueError(
                    f"{name} is {x.dtype} {tuple(x.shape)}; it must be int64 {tuple(tokens.shape)} as tokens"
                )
        if state is not None and state.position.shape[0] != tokens.shape[0]:
            raise ValueError(f"the state is of a batch of {state.position.shape[0]}, tokens of {tokens.shape[0]}")
        if tokens.device.type != "cpu":  # the checks below would make the device wait
            return
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(
                f"token ids must lie in [0, {self.config.vocab_size}), got {int(tokens.min())} to {int(tokens.max())}: "
                "does the data's tokenizer match model.vocab_size?"
            )
        if positions is not None:
            self._check_starts(positions, state)

    def _check_starts(self, positions: Tensor, state: ModelState | None) -> None:
        columns = torch.arange(positions.shape[1])
        states = [LayerState()] * len(self.layers) if state is None else state.layers
        for block, layer in zip(self.layers, states, strict=True):
            if layer.segment is not None:
                offset = layer.segment.kv[0].shape[1]
            else:
                offset = 0 if layer.memory is None else layer.memory.memory.offset
            if (positions[:, (columns + offset) % block.config.document_multiple != 0] == 0).any():
                multiple = self.config.document_multiple
                raise ValueError(f"a document starts off the grid: pad documents to a multiple of {multiple} tokens")


def build_model(config: ModelConfig) -> TitansForCausalLM:
    """The model of a configuration, freshly initialised from torch's global random state; on the meta device, without values."""
    device = torch.get_default_device()
    with torch.device("meta"):
        model = TitansForCausalLM(config)
    if device.type != "meta":
        model.to_empty(device=device).init_weights()
    return model
