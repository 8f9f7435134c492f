"""Attention over several sets of keys, each by a call of its own, joined by the calls' log-sum-exps; exact in both directions.

A flash kernel's backward pass computes p = exp(q.k - lse) and ds = p * (dO.v - dO.O) from the O and the lse that it is given. With
those of *all* keys, p and ds are the ones of the joint softmax, so each call's raw backward pass gives the exact gradients of its
own keys, and dq is their sum. Autograd through the libraries' own functions does not: they drop the gradient of the lse.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Span(NamedTuple):
    """Which of its keys a call's queries see: sequence s has the queries queries[s] to queries[s + 1] and the keys keys[s] to
    keys[s + 1]; with `causal` its last query stands at its last key, and with `window` sees itself and window - 1 before it."""

    queries: Tensor  # [sequences + 1] int32, on the queries' device
    keys: Tensor  # [sequences + 1] int32
    longest_queries: int  # no sequence has more
    longest_keys: int
    causal: bool = False
    window: int | None = None  # None: all keys before; for causal ones only

    @property
    def left(self) -> int:
        """Keys before its own place that a query sees, -1 for all: the window as flash kernels take it."""
        return -1 if self.window is None or self.window >= self.longest_keys else self.window - 1

    @property
    def right(self) -> int:
        return 0 if self.causal else -1


@dataclass(frozen=True)
class Library:
    """Kernels of one library. N queries and M keys of all sequences lie one after the other.

    forward: (q [N, H, D], k, v [M, H, D], Span) -> out [N, H, D], lse [H, N] (natural logarithm).
    backward: (dO, q, k, v, O, lse, Span) -> dq, dk, dv from the O and lse given; zero at keys of a sequence without queries.
    refuses: (q) -> why it cannot serve on this machine, this device, dtype and head size, or None.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    refuses: Callable[[Tensor], str | None]


def merged_attention(library: Library, q: Tensor, parts: Sequence[tuple[Tensor, Tensor, Span]]) -> Tensor:
    """q [N, H, D]; parts: keys and values [M, H, D] with what the queries see of them, every query a key in the first at least.
    Returns [N, H, D]."""
    return _Merged.apply(library, tuple(span for _, _, span in parts), q, *(x for part in parts for x in part[:2]))


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, spans, q, *keys_values):
        ctx.library, ctx.spans = library, spans
        found = [library.forward(q, k, v, span) for (k, v), span in zip(_pairs(keys_values), spans, strict=True)]
        out, lse = found[0]
        if len(found) > 1:
            lse = torch.stack([part for _, part in found]).logsumexp(0)
            # a product with the float32 weights is float32: one rounding, at the end
            joint = sum((part - lse).exp().t().unsqueeze(-1) * y for y, part in found)
            out = joint.to(out.dtype)
        ctx.save_for_backward(q, out, lse, *keys_values)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, out, lse, *keys_values = ctx.saved_tensors
        grad = grad.contiguous()
        found = [
            ctx.library.backward(grad, q, k, v, out, lse, span)
            for (k, v), span in zip(_pairs(keys_values), ctx.spans, strict=True)
        ]
        dq = found[0][0]
        if len(found) > 1:
            wide = torch.promote_types(q.dtype, torch.float32)
            dq = sum(part.to(wide) for part, _, _ in found).to(q.dtype)
        return None, None, dq, *(x for _, dk, dv in found for x in (dk, dv))


def _pairs(keys_values: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(keys_values[::2], keys_values[1::2], strict=True))
