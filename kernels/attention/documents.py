"""Packed documents as sequences of a variable-length call, made on the device: the host never learns how many there are."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from titans_pretrain.kernels.attention.merged import Span


def alone(limit: Tensor) -> Tensor:
    """[B, T] bool: tokens that see no token but themselves and belong to no longer document: padding, and documents of one."""
    return (limit == 0) & (pad(limit[:, 1:], (0, 1)) != 1)


def most_sequences(batch: int, tokens: int, multiple: int) -> int:
    """A bound on the sequences of `document_span`, from shapes and `multiple` (tokens between two starts) alone."""
    return batch * (_most_starts(tokens, multiple) + 1)


def document_span(limit: Tensor, tail: int, window: int, multiple: int) -> Span:
    """Documents of a batch whose rows have T queries and tail + T keys each; limit [B, T]: how far back each token sees at most.

    A sequence starts at a row's first token and wherever a document of two tokens or more does; what is `alone` goes with the
    sequence before it, unseen by its tokens, and has to be attended to apart. The tail's keys that the first document does not
    reach are a sequence without queries. Behind the last document a row has empty sequences, up to the bound."""
    batch, tokens = limit.shape
    starts = (limit == 0) & ~alone(limit)
    starts = torch.cat((torch.ones_like(starts[:, :1]), starts[:, 1:]), 1)
    number = torch.arange(1, _most_starts(tokens, multiple) + 1, device=limit.device).expand(batch, -1).contiguous()
    queries = torch.searchsorted(starts.cumsum(1), number)  # where the n-th sequence starts; T: there is none
    reach = limit[:, :1].clamp(max=tail)
    keys = torch.cat((tail - reach, queries[:, 1:] + tail), 1)
    queries, keys = (pad(x, (1, 0)) for x in (queries, keys))
    row = torch.arange(batch, device=limit.device)[:, None]
    total = tail + tokens
    return Span(
        pad((queries + row * tokens).flatten(), (0, 1), value=batch * tokens).int(),
        pad((keys + row * total).flatten(), (0, 1), value=batch * total).int(),
        tokens, total, causal=True, window=window,
    )  # fmt: skip


def _most_starts(tokens: int, multiple: int) -> int:
    return 2 + tokens // max(multiple, 2)
