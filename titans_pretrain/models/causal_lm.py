"""A Titans language model: embeddings, blocks of one variant, norm and head."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titans_pretrain.config.model import ModelConfig
from titans_pretrain.kernels.cross_entropy import linear_cross_entropy
from titans_pretrain.models.blocks import LmmBlock, MagBlock, MalBlock, TransformerBlock
from titans_pretrain.models.mac import MacBlock
from titans_pretrain.models.norm import RMSNorm
from titans_pretrain.models.rotary import rotation
from titans_pretrain.models.state import ModelState, positions_after

BLOCKS = {"lmm": LmmBlock, "mac": MacBlock, "mag": MagBlock, "mal": MalBlock, "transformer": TransformerBlock}
RECOMPUTE = ("none", "block")


@dataclass
class CausalLMOutput:
    state: ModelState
    logits: Tensor | None = None  # [B, T, vocab_size], without labels
    loss: Tensor | None = None  # scalar, with labels


class TitansForCausalLM(nn.Module):
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
        c = self.config
        by = rotation(absolute, c.rotary_dim, c.rope_theta, torch.promote_types(x.dtype, torch.float32))
        states = []
        for i, layer in enumerate(self.layers):
            arguments = (x, None if state is None else state.layers[i], by, positions)
            if self.recompute == "block" and torch.is_grad_enabled():
                x, new = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x, new = layer(*arguments)
            states.append(new)
        after = ModelState(tuple(states), positions_after(positions, position, tokens.shape[1]))
        hidden = self.norm(x)
        head = (self.lm_head or self.embed_tokens).weight
        if labels is None:
            return CausalLMOutput(after, logits=nn.functional.linear(hidden, head))
        total, count = self.cross_entropy(hidden.flatten(0, 1), head, labels.flatten())
        if num_items_in_batch is None:
            num_items_in_batch = count.clamp(min=1)
        return CausalLMOutput(after, loss=total / num_items_in_batch)

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
        multiple = self.config.document_multiple
        if multiple == 1:
            return
        columns = torch.arange(positions.shape[1])
        if state is None:
            offset = 0
        else:
            first = state.layers[0]
            offset = first.memory.memory.offset if first.segment is None else first.segment.keys[0].shape[1]
        if (positions[:, (columns + offset) % multiple != 0] == 0).any():
            raise ValueError(f"a document starts off the grid: pad documents to a multiple of {multiple} tokens")


def build_model(config: ModelConfig) -> TitansForCausalLM:
    """The model of a configuration, freshly initialised from torch's global random state."""
    return TitansForCausalLM(config)
