"""The backward pass: every group's states once more, then its gradients, last group first."""

from collections.abc import Sequence

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunked.walk import States
from titans_pretrain.kernels.memory_scan.triton.call import Call, Carried, Matrices, Tables, Tokens
from titans_pretrain.kernels.memory_scan.triton.forward import Results, Start
from titans_pretrain.kernels.memory_scan.triton.read_back import read_back
from titans_pretrain.kernels.memory_scan.triton.state import walk
from titans_pretrain.kernels.memory_scan.triton.state_back import state_back
from titans_pretrain.kernels.memory_scan.triton.tables import tables
from titans_pretrain.kernels.memory_scan.triton.tables_back import tables_back


def backward(
    call: Call, x: Tokens, states: States, reset: Tensor | None, results: Results, d_y: Tensor, d_states: States
) -> tuple[Tokens, States]:
    """Gradients of what a call was given, float32. results: of forward, but for y and the states after the call, whose gradients
    are d_y (contiguous) and d_states."""
    start = Start(call, states)
    initial = start.initial or start.state()
    carried = _carried(call, d_states)
    gradients = Tokens(*(torch.empty(t.shape, device=t.device) for t in x))
    for number, group in reversed(list(enumerate(call.groups()))):
        coefficients = tables(call, group, x)
        given = start.given(group, x, results, reset)
        run = Matrices.of(_matrices(call, results.checkpoints[number - 1].clone())) if number else start.state()
        walk(call, group, x, coefficients, run, initial, given, known=True)
        d_tables = Tables.empty(call, group, x.q.device)
        reads = read_back(call, group, x, coefficients, given, d_y, gradients.q, gradients.k, d_tables)
        state_back(call, group, x, coefficients, given, reads, carried, gradients.k, gradients.v, d_tables)
        tables_back(call, group, x, coefficients, d_tables, gradients.forget, gradients.momentum, gradients.lr)
        del coefficients, given, run, reads, d_tables  # before those of the next group are made
    return gradients, _states(call, states, carried)


def _matrices(call: Call, slots: Tensor) -> list[Tensor]:
    """slots [2 L, N, D * F] as matrices."""
    return [x.unflatten(1, call.sizes[i // 2]) for i, x in enumerate(slots)]


def _carried(call: Call, d: States) -> Carried:
    """What goes back from the states after the call."""

    def merged(xs: Sequence[Tensor]) -> list[Tensor]:
        return [x.flatten(0, 1).float().contiguous().clone() for x in xs]

    def pair(xs: list[Tensor]) -> tuple[Tensor, Tensor]:
        return xs[0], xs[-1]

    weights, surprise = merged(d.weights), merged(d.surprise)
    state = Matrices.of([x for slots in zip(weights, surprise, strict=True) for x in slots])
    anchor = merged(d.anchor) if d.anchor is not None else [torch.zeros_like(w) for w in weights]
    towards = [w.clone() for w in weights] if call.to_initial else weights  # W is V + W_init
    documents = Matrices.of([torch.zeros_like(x) for x in state.slots()]) if call.resets else state
    return Carried(state, pair(anchor), pair(towards), documents)


def _states(call: Call, given: States, carried: Carried) -> States:
    """Gradients of the states that the call was given, [B, H, d_in, d_out]."""

    def heads(xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(x.unflatten(0, (call.batch, call.heads)) for x in xs[-call.depth :])

    weights, surprise = carried.state.weights(), carried.state.surprise()
    initial = initial_surprise = None
    if given.initial_weights is not None:
        initial = [torch.zeros_like(w) for w in weights]
        initial_surprise = [torch.zeros_like(w) for w in weights]
        if call.resets:
            initial, initial_surprise = carried.initial.weights(), carried.initial.surprise()
        if call.to_initial:  # V = W - W_init at the start; the initial state's V is zero for any W_init
            initial = [t - w for t, w in zip(carried.towards[-call.depth :], weights, strict=True)]
    return States(
        heads(weights), heads(surprise), heads(carried.anchor) if given.anchor is not None else None,
        None if initial is None else heads(initial), None if initial_surprise is None else heads(initial_surprise),
    )  # fmt: skip
