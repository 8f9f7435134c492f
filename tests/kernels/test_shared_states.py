"""A state of batch 1 serves a whole batch, half read too: every row is what it is with a state of its own."""

import pytest
import torch
from torch.testing import assert_close

from titans_pretrain.kernels.memory_scan import MemoryState, memory_scan, memory_step

BATCH, HEADS, DIM, CHUNK = 3, 2, 5, 4
ORDER = ("q", "k", "v", "forget", "momentum", "lr")


def inputs(tokens, batch=BATCH, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, HEADS)
    x = {n: torch.randn(*shape, DIM, generator=g, dtype=torch.float64) for n in "qkv"}
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    for name, high in (("forget", 0.5), ("momentum", 0.9), ("lr", 0.2)):
        x[name] = high * torch.rand(*shape, 1, generator=g, dtype=torch.float64)
    return {n: t.requires_grad_() for n, t in x.items()}


def half_read():
    """A state of batch 1 that stands two tokens into a chunk, its anchor older than its weights; with what it came from."""
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(HEADS, a, b, generator=g, dtype=torch.float64) for a, b in ((DIM, 7), (7, DIM))]
    weights = [w.requires_grad_() for w in weights]
    start = MemoryState.initial(weights, 1)
    x = inputs(2 + CHUNK, batch=1, seed=6)
    _, state = memory_scan(*(x[n] for n in ORDER), start, chunk_size=CHUNK, residual_norm=True)
    assert state.offset == 2 and (state.anchor[0] - state.weights[0]).abs().max() > 1e-3
    return state, start, weights


@pytest.mark.parametrize("how", ["chunked", "reference", "step"])
def test_a_half_read_state_of_batch_1(how):
    state, start, weights = half_read()
    tokens = 1 if how == "step" else 9
    x = inputs(tokens)

    def run(state, rows):
        options = dict(chunk_size=CHUNK, residual_norm=True, forget_to="initial", initial_state=start)
        arguments = [x[n][rows] for n in ORDER]
        if how == "step":
            return memory_step(*arguments, state, **options)
        return memory_scan(*arguments, state, backend=how, **options)

    together, after = run(state, slice(None))
    alone = [run(state, slice(i, i + 1)) for i in range(BATCH)]
    parts = [torch.cat([y for y, _ in alone])]
    parts += [torch.cat(ws) for ws in zip(*((*s.weights, *s.surprise, *(s.anchor or ())) for _, s in alone))]
    whole = [together, *after.weights, *after.surprise, *(after.anchor or ())]
    assert after.offset == (2 + tokens) % CHUNK
    for a, b in zip(whole, parts, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)
    grown = state.expand(BATCH)
    for a, b in zip(run(grown, slice(None))[1].weights, after.weights, strict=True):
        assert torch.equal(a, b)
    leaves = [*x.values(), *weights]
    found, wanted = (
        torch.autograd.grad(sum(y.square().sum() for y in ys), leaves, retain_graph=True) for ys in (whole, parts)
    )
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_expand_keeps_every_part():
    state, _, _ = half_read()
    grown = state.expand(BATCH)
    assert grown.offset == state.offset and grown.batch == BATCH
    for name in ("weights", "surprise", "anchor"):
        for old, new in zip(getattr(state, name), getattr(grown, name), strict=True):
            assert torch.equal(new, old.expand_as(new)) and new.shape[0] == BATCH
    with pytest.raises(ValueError, match="batch of 2"):
        grown.expand(2)
