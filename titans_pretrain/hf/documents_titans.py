"""Padding and packed documents of a batch, as the model takes them: padding behind the tokens, documents on the grid.

The memory learns from every token that it reads, so padding may not be read; and its chunks are counted from a document's start.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Grid:
    """Where the tokens of a batch [B, T] stand in rows [B, W] that the model can read."""

    columns: Tensor  # [B, T] of each token; at padding that of the token before it, -1 before the first
    positions: Tensor  # [B, W] of each token in its document, -1 where there is none
    real: Tensor  # [B, T] bool, False at padding

    def place(self, x: Tensor) -> Tensor:
        """x [B, T, ...] -> [B, W, ...], zeros where there is no token."""
        batch, width = self.positions.shape
        target = torch.where(self.real, self.columns, width)
        rows = torch.arange(batch, device=x.device)[:, None]
        out = x.new_zeros(batch, width + 1, *x.shape[2:])
        return out.index_put((rows, target), x)[:, :width]

    def take(self, y: Tensor) -> Tensor:
        """y [B, W, dim] -> [B, T, dim]. Padding is not read, so there the last token before it still stands; zeros before the first."""
        index = self.columns.clamp(min=0)[..., None].expand(-1, -1, y.shape[-1])
        return y.gather(1, index) * (self.columns >= 0)[..., None]


def on_grid(real: Tensor, starts: Tensor, multiple: int) -> Grid:
    """Tokens of each row one after the other, each document at a multiple of `multiple`. real, starts [B, T] bool."""
    number = real.cumsum(1) - 1
    first = torch.where(starts, number, 0).cummax(1).values  # the number of the first token of a token's document
    gap = torch.where(starts, (pad(first[:, :-1], (1, 0)) - number) % multiple, 0)
    columns = number + gap.cumsum(1)
    width = max(int(columns.max()) + 1, 1)
    grid = Grid(columns, columns.new_empty(len(real), width), real)
    return Grid(columns, grid.place(number - first + 1) - 1, real)


def real_tokens(attention_mask: Tensor | None, batch: int, tokens: int, read_before: int) -> Tensor | None:
    """[B, T] bool, False at padding; None: all are tokens. Raises ValueError for a mask of another shape."""
    if attention_mask is None:
        return None
    if attention_mask.shape not in ((batch, tokens), (batch, read_before + tokens)):
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}; for {tokens} tokens after {read_before} that the cache has "
            f"read it must be [{batch}, {tokens}] or [{batch}, {read_before + tokens}], 1 for tokens and 0 for padding"
        )
    real = attention_mask[:, -tokens:].bool()
    return None if real.all() else real


def document_starts(real: Tensor, position_ids: Tensor | None) -> Tensor:
    """[B, T] bool: the first token of each row, and where position_ids [1 or B, T] are 0. Raises ValueError where these do not
    count a document's tokens."""
    first = real & (real.cumsum(1) == 1)
    if position_ids is None:
        return first
    if position_ids.dim() != 2 or position_ids.shape[1] != real.shape[1] or len(position_ids) not in (1, len(real)):
        raise ValueError(f"position_ids is {tuple(position_ids.shape)}; it must be {tuple(real.shape)} as the tokens")
    starts = first | (real & (position_ids == 0))
    ahead = position_ids - real.cumsum(1)
    last_start = torch.where(starts, torch.arange(real.shape[1], device=real.device), 0).cummax(1).values
    if (real & (ahead != ahead.gather(1, last_start))).any():
        raise ValueError(
            "position_ids must count the tokens of each document up by one, 0 where one starts; leave them out for one document a row"
        )
    return starts
