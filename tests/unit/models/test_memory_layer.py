"""The memory layer's promises, one by one: its gates' bounds, padding, what persistent tokens leave, what may be kept."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from titans_pretrain.config.model import MemoryConfig, ModelConfig
from titans_pretrain.models import build_model
from titans_pretrain.models import memory as module

DIM, HEADS, CHUNK = 16, 2, 4


def build(persistent=3, **memory):
    """A block of the memory alone, float64, away from its initialisation."""
    settings = MemoryConfig(**(dict(heads=HEADS, expansion=2, chunk_size=CHUNK, max_lr=0.7, max_momentum=0.6) | memory))
    torch.manual_seed(0)
    model = build_model(
        ModelConfig("lmm", dim=DIM, layers=1, heads=2, vocab_size=31, persistent_tokens=persistent, memory=settings)
    ).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.2 * torch.randn_like(p))
            if name.endswith("forget_proj.bias"):
                p.add_(5.0)
    return model.layers[0]


def sample(tokens, seed=1):
    return torch.randn(2, tokens, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def calls(monkeypatch):
    """What the layer gives the scan, call by call: (q, k, v, forget, momentum, lr, state), and the state that came back."""
    seen = []
    real = module.memory_scan

    def spy(*arguments, **options):
        y, state = real(*arguments, **options)
        seen.append((arguments, state))
        return y, state

    monkeypatch.setattr(module, "memory_scan", spy)
    return seen


@pytest.mark.parametrize("per_layer_gates", [False, True])
def test_gates_stay_within_their_bounds_and_use_them(calls, per_layer_gates):
    block = build(persistent=0, per_layer_gates=per_layer_gates, step="telescoped")
    block.memory(30 * sample(200))
    (_, _, _, forget, momentum, lr, _), _ = calls[0]
    for gate, high in ((forget, 1.0), (momentum, 0.6), (lr, 0.7)):
        assert gate.shape == (2, 200, HEADS, 2 if per_layer_gates else 1)
        assert gate.min() >= 0 and gate.max() <= high
        assert gate.min() < 0.05 * high and gate.max() > 0.95 * high
    calls.clear()
    block.memory(sample(200))  # inputs as a norm gives them: strictly inside
    (_, _, _, forget, momentum, lr, _), _ = calls[0]
    for gate, high in ((forget, 1.0), (momentum, 0.6), (lr, 0.7)):
        assert gate.min() > 0 and gate.max() < high


def test_gates_at_the_start(calls):
    """alpha = sigmoid(-6), eta and theta half of their maximum: their biases alone, for an input of zero."""
    torch.manual_seed(0)
    config = ModelConfig("lmm", dim=DIM, layers=1, heads=2, vocab_size=31, persistent_tokens=0)
    layer = build_model(config).layers[0].memory
    weights = [layer.forget_proj.weight, layer.momentum_proj.weight, layer.lr_proj.weight]
    for w in weights:
        torch.nn.init.zeros_(w)
    layer(torch.randn(1, 64, DIM))
    (_, _, v, forget, momentum, lr, _), _ = calls[0]
    m = config.memory
    assert_close(forget, torch.full_like(forget, 1 / (1 + torch.e**6)))
    assert_close(momentum, torch.full_like(momentum, m.max_momentum / 2))
    # less where a key is short, or like an earlier one of its chunk; the step is divided among the repetitions of momentum, and is
    # relative to the value
    lr = lr * (1 + v.square().sum(-1, keepdim=True)).sqrt()
    largest = m.largest_lr / 2 * (1 - m.max_momentum / 2)
    assert lr.max() <= largest and lr.max() > 0.99 * largest


def test_gates_under_autocast_add_their_biases_in_float32(calls):
    """A bfloat16 sum with -6 would leave 2,048 alphas on a hundred values or so."""
    torch.manual_seed(0)
    config = ModelConfig("lmm", dim=64, layers=1, heads=2, vocab_size=31, persistent_tokens=0)
    layer = build_model(config).layers[0].memory
    x = torch.randn(1, 2048, 64)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        product = torch.nn.functional.linear(x, layer.forget_proj.weight)
    (_, _, _, forget, momentum, lr, _), _ = calls[0]
    assert forget.dtype == momentum.dtype == lr.dtype == torch.float32
    assert forget.unique().numel() > 1000
    exact = torch.sigmoid(product.double() - 6)[..., None]
    assert_close(forget.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", ["plain", "telescoped", "relative"])
def test_padding_is_inert(calls, step):
    """Every gate is exactly zero there, and the memory after it is the memory before it."""
    block = build(step=step, damping=1.0, depth=3)
    positions = torch.tensor([[*range(5), -1, -1, -1], [*range(2), *[-1] * 6]])
    x = sample(8)
    _, after = block.memory(x, None, positions, block.persistent)
    gates = calls[-1][0][3:6]
    for gate in gates:
        assert (gate[positions < 0] == 0).all() and (gate[positions >= 0] > 0).all()
    for row, tokens in ((0, 5), (1, 2)):
        _, before = block.memory(x[row : row + 1, :tokens], None, None, block.persistent)
        for w, unpadded in zip(after.memory.weights, before.memory.weights, strict=True):
            assert_close(w[row], unpadded[0], rtol=1e-13, atol=1e-13)
        assert all(not s[row].any() for s in after.memory.surprise)


def test_padding_of_any_content_changes_nothing():
    block = build()
    positions = torch.tensor([[*range(5), -1, -1, -1], [*range(2), *[-1] * 6]])
    x = sample(8)
    other = torch.where(positions[..., None] < 0, 100 * sample(8, seed=3), x)
    with torch.no_grad():
        (y, a), (z, b) = (block.memory(v, None, positions, block.persistent) for v in (x, other))
    assert torch.equal(y[positions >= 0], z[positions >= 0])
    for w, v in zip(a.memory.weights, b.memory.weights, strict=True):
        assert torch.equal(w, v)


def test_the_surprise_of_the_persistent_tokens_meets_the_first_token():
    """A first token whose key is nothing writes nothing: what it leaves is eta times the surprise it found."""
    block = build(conv_size=1, residual_norm=False)  # no taps that reach the persistent tokens
    layer = block.memory
    start = layer.initial(block.persistent).memory
    assert all(s.abs().max() > 1e-3 for s in start.surprise)
    _, after = layer(torch.zeros(1, 1, DIM, dtype=torch.float64), None, None, block.persistent)
    eta = (0.6 * layer.momentum_proj.bias.sigmoid()).view(1, HEADS, 1, 1)
    for s, found, w, start_w in zip(
        start.surprise, after.memory.surprise, after.memory.weights, start.weights, strict=True
    ):
        assert_close(found, eta * s, rtol=1e-12, atol=1e-14)
        assert_close(w, start_w + eta * s, rtol=1e-12, atol=1e-14)  # forgetting goes to where the document started


def test_persistent_tokens_are_read_before_the_first_one_and_again_after_a_reset(calls):
    block = build()
    layer = block.memory
    start = layer.initial(block.persistent)
    assert start.memory.offset == 0  # three tokens of a chunk of four: the first real one opens a fresh chunk
    x = sample(8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
    y, _ = layer(x, None, positions, block.persistent)
    alone, _ = layer(x[:, 4:], None, None, block.persistent)
    assert_close(y[:, 4:], alone, rtol=1e-12, atol=1e-12)
    bare, _ = layer(x[:, 4:], None, None, None)
    assert (bare - alone).abs().max() > 1e-3
    taps = [t[0] for t in start.conv]
    wanted = [getattr(layer, f"{n}_proj")(block.persistent) for n in "qkv"]
    assert all(torch.equal(t, w[-3:]) for t, w in zip(taps, wanted, strict=True))


@pytest.mark.parametrize("forget_to", ["initial", "zero"])
def test_a_kept_start_is_for_inference_only(forget_to):
    """Without gradients the state carries where documents start, to spare the next call a scan; with them it is never used:
    it knows no gradient, and the parameters may have changed."""
    block = build(forget_to=forget_to)
    layer, x = block.memory, sample(12)
    positions = torch.tensor([[8, 9, 10, 11, *range(4), *range(4)]] * 2)
    with torch.no_grad():
        _, state = layer(x[:, :8], None, None, block.persistent)
    assert state.initial is not None
    _, with_gradients = layer(x[:, :8], None, None, block.persistent)
    assert with_gradients.initial is None

    def gradients(state):
        y, _ = layer(x, state, positions, block.persistent)
        used = [block.persistent, *layer.weights, layer.k_conv, layer.lr_proj.bias]
        return [y, *torch.autograd.grad(y.square().sum(), used)]

    for a, b in zip(gradients(state), gradients(replace(state, initial=None)), strict=True):
        assert torch.equal(a, b) and a.any()
    with torch.no_grad():
        kept, _ = layer(x, state, positions, block.persistent)
    assert_close(kept, gradients(state)[0], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for p in block.parameters():
            p.mul_(1.1)
    for a, b in zip(gradients(state), gradients(replace(state, initial=None)), strict=True):
        assert torch.equal(a, b)


def test_retrieval_reads_the_weights_it_is_given_and_writes_nothing():
    layer = build().memory
    _, state = layer(sample(8))
    q = sample(3).unflatten(-1, (HEADS, -1))
    fresh = layer.retrieve(q, layer.initial(None).memory.expand(2).weights)
    later = layer.retrieve(q, state.memory.weights)
    assert (fresh - later).abs().max() > 1e-3
    assert torch.equal(later, layer.retrieve(q, state.memory.weights))
    assert_close(layer.retrieve(5 * q, state.memory.weights), later, rtol=1e-3, atol=1e-3)  # of a unit query


def test_a_vector_of_no_length_asks_and_writes_nothing(calls):
    layer = build(persistent=0).memory
    y, _ = layer(torch.zeros(1, 4, DIM, dtype=torch.float64))
    lr = calls[0][0][5]
    assert not y.any() and not lr.any()
    x = torch.zeros(1, 4, DIM, dtype=torch.float64, requires_grad=True)
    y, state = layer(x)
    total = y.sum() + sum(w.sum() for w in state.memory.weights)
    assert torch.autograd.grad(total, x)[0].isfinite().all()
