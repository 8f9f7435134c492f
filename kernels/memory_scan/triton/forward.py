"""The forward pass: group by group, tables, walk, reads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunked.walk import States
from titans_pretrain.kernels.memory_scan.triton.call import Call, Given, Group, Matrices, Tokens
from titans_pretrain.kernels.memory_scan.triton.read import read
from titans_pretrain.kernels.memory_scan.triton.state import walk
from titans_pretrain.kernels.memory_scan.triton.tables import tables


@dataclass
class Results:
    """What a call computes.

    weights, surprise, anchor: of the state after the last token, over the layers, float32 [B, H, d_in, d_out]; the anchor is
        empty at a chunk's end
    e, n, rstd: see Given
    checkpoints: V and S at the start of every group but the first, [groups - 1, 2 L, N, D * F], for the backward pass
    """

    y: Tensor
    weights: list[Tensor]
    surprise: list[Tensor]
    anchor: list[Tensor]
    e: Tensor
    n: Tensor
    rstd: Tensor
    checkpoints: Tensor

    @staticmethod
    def empty(call: Call, x: Tokens, differentiable: bool) -> "Results":
        n, device = call.n, x.q.device

        def states() -> list[Tensor]:
            shape = (call.batch, call.heads)
            return [torch.empty(*shape, *sizes, device=device) for sizes in call.sizes]

        normed = (n, call.tokens) if call.residual_norm else (0, 0)
        return Results(
            torch.empty(x.q.shape, dtype=x.q.dtype, device=device), states(), states(), states() if call.ends_half else [],
            torch.empty(n, call.tokens, call.dim, dtype=call.dtype, device=device),
            torch.empty(*normed, call.dim, dtype=call.dtype, device=device), torch.empty(normed, device=device),
            torch.empty(call.checkpoints * differentiable, 2 * call.depth, n, call.dim * call.hidden, device=device),
        )  # fmt: skip

    def flat(self) -> list[Tensor]:
        return [self.y, *self.weights, *self.surprise, *self.anchor, self.e, self.n, self.rstd, self.checkpoints]


class Start:
    """The states that a call is given, as the kernels have them."""

    def __init__(self, call: Call, states: States):
        self.call, self.states = call, states
        self.towards = (states.weights[0], states.weights[-1])  # not looked at
        if call.to_initial:
            cast = [x.flatten(0, 1).to(call.dtype).contiguous() for x in states.initial_weights]
            self.towards = (cast[0], cast[-1])
        self.initial = self.matrices(states.initial_weights, states.initial_surprise) if call.resets else None

    def state(self) -> Matrices:
        """V and S before the call, a copy."""
        return self.matrices(self.states.weights, self.states.surprise)

    def matrices(self, weights: tuple[Tensor, ...], surprise: tuple[Tensor, ...]) -> Matrices:
        """V and S, a copy."""
        slots = [x for w, s in zip(self.as_v(weights), surprise, strict=True) for x in (w, s)]
        merged = [torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x).flatten(0, 1) for x in slots]
        return Matrices.of(merged)

    def as_v(self, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self.call.to_initial:
            return weights
        return tuple(w - t for w, t in zip(weights, self.states.initial_weights, strict=True))

    def as_weights(self, state: Matrices) -> list[Tensor]:
        """W [B, H, d_in, d_out] of a state."""
        v = [x.unflatten(0, (self.call.batch, self.call.heads)) for x in state.weights()]
        return [x + t for x, t in zip(v, self.states.initial_weights, strict=True)] if self.call.to_initial else v

    def anchor_after_reset(self, state: Matrices, reset: Tensor | None) -> list[Tensor]:
        """Of the call's last chunk, from the state before it: a copy."""
        weights = self.as_weights(state)
        if reset is None:
            return [w.clone() for w in weights]
        row = reset[:, -1].view(-1, 1, 1, 1)
        return [torch.where(row, i, w) for i, w in zip(self.states.initial_weights, weights, strict=True)]

    def given(self, group: Group, x: Tokens, results: Results, reset: Tensor | None) -> Given:
        """What a group is worked from; its kept states but for an earlier call's anchor are still to be filled."""
        call = self.call
        kept = Matrices.empty(call, 1 + group.tiles, dtype=call.dtype, device=x.q.device)
        if call.offset and group.first == call.offset // call.tile:
            for slots, anchor in zip(kept.weights(), self.as_v(self.states.anchor), strict=True):
                slots[:, 0] = anchor.flatten(0, 1)
        rows = x.q if reset is None else reset.contiguous().view(torch.uint8)
        return Given(kept, self.towards, results.e, results.n, results.rstd, rows)


def forward(call: Call, x: Tokens, states: States, reset: Tensor | None, differentiable: bool) -> Results:
    """x contiguous; states float32; reset [B, chunks] bool where call.resets."""
    results = Results.empty(call, x, differentiable)
    start = Start(call, states)
    run = start.state()
    initial = start.initial or run  # not looked at without resets
    anchor = states.anchor
    groups = call.groups()
    for number, group in enumerate(groups):
        if differentiable and number:
            for kept, matrix in zip(results.checkpoints[number - 1], run.slots(), strict=True):
                kept.copy_(matrix.flatten(1))
        if call.ends_half and call.opens_last and number == len(groups) - 1:
            anchor = start.anchor_after_reset(run, reset)
        coefficients = tables(call, group, x)
        given = start.given(group, x, results, reset)
        walk(call, group, x, coefficients, run, initial, given, known=False)
        read(call, group, x, coefficients, given, results.y)
        del coefficients, given  # before those of the next group are made
    for out, weights in (
        (results.weights, start.as_weights(run)),
        (results.surprise, run.surprise()),
        (results.anchor, anchor),
    ):
        for to, found in zip(out, weights or (), strict=bool(out)):
            to.copy_(found.view_as(to))
    return results
