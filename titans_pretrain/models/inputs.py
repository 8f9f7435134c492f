"""What a language model may be given. Shapes are checked wherever the tensors are; values only where that makes no device wait: in
tensors on the CPU, so for a training step on any device before its batch goes there."""

import torch
from torch import Tensor

from titans_pretrain.config.model import ModelConfig
from titans_pretrain.kernels.backends import values_at_hand
from titans_pretrain.models.state import ModelState


def check_inputs(
    c: ModelConfig, tokens: Tensor, labels: Tensor | None, state: ModelState | None, positions: Tensor | None
) -> None:
    """Raises ValueError for what TitansForCausalLM.forward can't read."""
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or 0 in tokens.shape:
        raise ValueError(f"tokens must be int64 [B, T] with T >= 1, got {tokens.dtype} {tuple(tokens.shape)}")
    for name, x in (("labels", labels), ("positions", positions)):
        if x is not None and (x.shape != tokens.shape or x.dtype != torch.int64):
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}; it must be int64 {tuple(tokens.shape)} as tokens")
    if state is not None and state.position.shape[0] != tokens.shape[0]:
        raise ValueError(f"the state is of a batch of {state.position.shape[0]}, tokens of {tokens.shape[0]}")
    if state is not None and state.ragged and (positions is not None or tokens.shape[1] > 1):
        raise ValueError("rows that have read different numbers of tokens take one token at a time, and no positions")
    check_values(c, tokens, positions, state)


def check_values(c: ModelConfig, tokens: Tensor, positions: Tensor | None, state: ModelState | None = None) -> None:
    """Raises ValueError for tokens and positions [B, T] whose values do not fit, if they are at hand."""
    if not values_at_hand(tokens):
        return
    if tokens.min() < 0 or tokens.max() >= c.vocab_size:
        raise ValueError(
            f"token ids must lie in [0, {c.vocab_size}), got {int(tokens.min())} to {int(tokens.max())}: "
            "does the data's tokenizer match model.vocab_size?"
        )
    if positions is None:
        # A position of 0 follows padding only: after a token it is 1 at least.
        if state is not None and (state.position == 0).any():
            raise ValueError(
                "the state ends in padding, and no document goes on behind that: give positions, 0 where the next one starts"
            )
        return
    multiple = c.document_multiple
    grids = {(multiple, 0)} if state is None else _grids(c, state)
    columns = torch.arange(positions.shape[1])
    if any((positions[:, (columns + read) % every != 0] == 0).any() for every, read in grids):
        raise ValueError(f"a document starts off the grid: pad documents to a multiple of {multiple} tokens")


def _grids(c: ModelConfig, state: ModelState) -> set[tuple[int, int]]:
    """Of each layer: the tokens of its chunk (of mac's segment), and how many of one are read."""
    found = set()
    for layer, held in zip(c.layer_configs, state.layers, strict=True):
        if held.segment is not None:
            found.add((layer.document_multiple, held.segment.kv[0].shape[1]))
        elif held.memory is not None:
            found.add((layer.document_multiple, held.memory.memory.offset))
    return found
