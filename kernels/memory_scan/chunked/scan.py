"""The chunked scan as one differentiable operation.

Saved for the backward pass: what it was given, and the state at the start of every span but the first. All through autograd's own
saved tensors, so that activation checkpointing and torch's hooks see them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_pretrain.kernels.backends import without_autocast
from titans_pretrain.kernels.memory_scan.chunked import backward, forward, network, tables
from titans_pretrain.kernels.memory_scan.chunked.network import Network
from titans_pretrain.kernels.memory_scan.chunked.spans import Span, spans_of
from titans_pretrain.kernels.memory_scan.chunked.tiles import Matrices, TileFunctions
from titans_pretrain.kernels.memory_scan.chunked.walk import SpanSums, States, Walk
from titans_pretrain.kernels.memory_scan.chunked.walk_back import WalkBack
from titans_pretrain.kernels.memory_scan.hidden_split import HiddenSplit
from titans_pretrain.kernels.memory_scan.options import ScanOptions
from titans_pretrain.kernels.memory_scan.state import MemoryState

TORCH = TileFunctions(
    tables=tables.decay_tables, tables_backward=tables.decay_tables_backward, inner_gradient=network.inner_gradient,
    read=forward.read, write=forward.write, backward=backward.backward,
)  # fmt: skip


@torch.compiler.disable  # a loop over the spans of the sequence, which a compiler would unroll
def scan(
    q: Tensor, k: Tensor, v: Tensor, forget: Tensor, momentum: Tensor, lr: Tensor, state: MemoryState, *, options: ScanOptions,
    reset: Tensor | None, initial_state: MemoryState | None, checkpoint_every: int | None, hidden_split: HiddenSplit,
    functions: TileFunctions = TORCH,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """See memory_scan; arguments are validated there."""
    initial = (None, None) if initial_state is None else (initial_state.weights, initial_state.surprise)
    states = States(state.weights, state.surprise, state.anchor, *initial)
    tensors = (q, k, v, forget, momentum, lr, *states.flat())
    offset = (state.offset + q.shape[1]) % options.chunk_size
    plan = Plan(
        tuple(spans_of(q.shape[1], options.chunk_size, state.offset, checkpoint_every)),
        Network.of(options, state.weights, hidden_split),
        to_initial=options.forget_to == "initial",
        leaves_half=offset > 0,
        differentiable=torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
        functions=functions,
        fields=states.like([()] * len(states.flat())),
    )
    y, *out = _Scan.apply(plan, reset, *tensors)
    weights, surprise, *anchor = zip(*[iter(out)] * state.depth, strict=True)
    return y, MemoryState(weights, surprise, anchor[0] if anchor else None, offset)


@dataclass(frozen=True)
class Plan:
    """How a call is walked through: no tensor in it."""

    spans: tuple[Span, ...]
    network: Network
    to_initial: bool  # forgetting goes to the initial weights
    leaves_half: bool  # the call ends inside a chunk
    differentiable: bool
    functions: TileFunctions
    fields: States  # which states were given: place holders

    def walk(self, tokens: list[Tensor], states: list[Tensor], reset: Tensor | None) -> Walk:
        return Walk(tokens, self.fields.like(states), reset, self.network, self.to_initial, self.functions)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: Plan, reset: Tensor | None, *tensors: Tensor):
        tokens, states = tensors[:6], tensors[6:]
        walk = plan.walk(tokens, states, reset)
        y = torch.empty_like(tokens[0], memory_format=torch.contiguous_format)
        state, anchor = walk.start, walk.anchor
        saved: list[Tensor] = []
        for number, span in enumerate(plan.spans):
            if plan.differentiable and number:
                saved += [x.clone() for x in state]
            anchor, sums = walk.forward(span, state, anchor, y)
            if plan.differentiable and sums is not None:
                saved += [sums.keys, sums.reads]
        ctx.plan = plan
        if plan.differentiable:
            ctx.save_for_backward(reset, *tensors, *saved)
        surprise = [x.chunk(2, 1)[1].clone() for x in state]  # a view would keep the weights alive as well
        out = [*walk.weights(state), *surprise]
        if plan.leaves_half:
            out += anchor if any(span.opens_chunk for span in plan.spans) else [x.clone() for x in anchor]
        return (y, *(x.unflatten(0, (len(y), -1)) for x in out))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor, *d_out: Tensor):
        plan: Plan = ctx.plan
        reset, *tensors = ctx.saved_tensors  # once: activation checkpointing unpacks only once
        count = 6 + len(plan.fields.flat())
        tokens, states, saved = tensors[:6], tensors[6:count], tensors[count:]
        with without_autocast(d_y):
            walk = plan.walk(tokens, states, reset)
            entering, sums = _unpack(plan, walk, saved)
            d_weights, d_surprise, *d_anchor = _by_layers([d.to(walk.dtype).flatten(0, 1) for d in d_out], walk.depth)
            back = WalkBack(walk, d_y, d_weights, d_surprise, [d.clone() for d in d_anchor[0]] if d_anchor else None)
            for number in reversed(range(len(plan.spans))):
                span = plan.spans[number]
                anchor = walk.anchor
                if span.opened_by is not None:
                    opener = plan.spans[span.opened_by]
                    anchor = walk.open_chunk(opener.chunk, [x.clone() for x in entering[span.opened_by]])
                back.span(span, [x.clone() for x in entering[number]], anchor, sums[number])
            d_states = back.states(walk.anchor is not None).flat()
        return (None, None, *back.tokens, *(x.unflatten(0, (len(d_y), -1)) for x in d_states))


def _unpack(plan: Plan, walk: Walk, saved: list[Tensor]) -> tuple[list[Matrices], list[SpanSums | None]]:
    """The state that enters each span, and what the ranks summed there."""
    waiting = iter(saved)
    entering, sums = [], []
    for number in range(len(plan.spans)):
        entering.append([next(waiting) for _ in range(walk.depth)] if number else walk.start)
        sums.append(SpanSums(next(waiting), next(waiting)) if plan.network.split.ranks > 1 else None)
    return entering, sums


def _by_layers(xs: list[Tensor], depth: int) -> list[Matrices]:
    return [xs[i : i + depth] for i in range(0, len(xs), depth)]
