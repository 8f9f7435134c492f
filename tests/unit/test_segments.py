"""A sequence in segments, in one process: the same losses and gradients as at once."""

import pytest
import torch

from titans_pretrain.config import Config, DataConfig, ParallelConfig, TrainConfig
from titans_pretrain.config.model import VARIANTS, MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.data.reader import Batch
from titans_pretrain.models import build_model
from titans_pretrain.models.state import tensors
from titans_pretrain.parallel.apply import build_engine
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.ring import LocalLink
from titans_pretrain.parallel.segments import SegmentedStage, state_template
from titans_pretrain.parallel.stage import Stage

TOKENS, LAYERS = 64, 2


HYBRIDS = {
    "mag-lmm": {
        "pattern": ["mag", {"variant": "lmm", "memory": {"chunk_size": 8, "depth": 3}}],
        "kv_heads": 2,
        "qk_norm": True,
    },
    "transformer-mac": {"pattern": [{"variant": "transformer", "window": None, "head_dim": 12}, "mac"]},
}


def make(variant: str, dtype=torch.float64, **memory):
    """variant: of all layers, or a key of HYBRIDS."""
    torch.manual_seed(0)
    settings = MemoryConfig(heads=2, chunk_size=4, expansion=2.0, **memory)
    config = ModelConfig(
        **HYBRIDS.get(variant, {"variant": variant}), dim=32, layers=LAYERS, heads=4, vocab_size=64, window=11, persistent_tokens=3, memory=settings,
        mac=MacConfig(segment=8),
    )  # fmt: skip
    return build_model(config).to(dtype)


def rows():
    g = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(0, 64, (2, 2, TOKENS), generator=g)
    labels[0, 5] = -100
    cut, padded = torch.cat([torch.arange(24), torch.arange(40)]), torch.arange(TOKENS)
    padded[40:] = torch.arange(24)
    padded[38:40] = -1
    return tokens, labels, torch.stack([cut, padded])


def run(model, segments, recompute, truncate=None):
    tokens, labels, positions = rows()
    model.zero_grad()
    stage = SegmentedStage(Stage(model, range(LAYERS)), LocalLink(), segments, recompute, truncate)
    loss = stage(tokens, positions=positions, labels=labels).sum() / 100
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", [pytest.param("none", marks=pytest.mark.slow), "block", "segment"])
@pytest.mark.parametrize("variant", [*VARIANTS, *HYBRIDS])
def test_segments_give_the_gradients_of_the_whole(variant, recompute):
    model = make(variant)
    tokens, labels, positions = rows()
    loss = model(tokens, labels=labels, positions=positions, num_items_in_batch=100).loss
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    found, gradients = run(model, 4, recompute)
    assert found == pytest.approx(loss.item(), rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", [*VARIANTS, *HYBRIDS])
def test_segments_under_autocast(variant):
    """The states that cross have the template's types, which is asserted on the way."""
    model = make(variant, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        whole, segments = run(model, 1, "none"), run(model, 4, "segment")
    assert segments[0] == pytest.approx(whole[0], rel=1e-2)


def test_telescoped_steps_cross_segments_too():
    model = make("lmm", depth=1, residual_norm=False, step="telescoped")
    whole, segments = run(model, 1, "none"), run(model, 8, "segment")
    assert segments[0] == pytest.approx(whole[0], rel=1e-12)
    for name, gradient in segments[1].items():
        torch.testing.assert_close(gradient, whole[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", [*VARIANTS, *HYBRIDS])
def test_the_template_has_the_shapes_of_the_state(variant):
    model = make(variant, torch.float32)
    tokens, _, positions = rows()
    for read in (8, 32):
        state = model(tokens[:, :read], positions=positions[:, :read]).state
        for block, layer in zip(model.layers, state.layers, strict=True):
            template = state_template(block, 2, read, torch.float32)
            assert [(t.shape, t.dtype) for t in tensors(template)] == [(t.shape, t.dtype) for t in tensors(layer)]


def test_truncation_drops_the_gradient_through_the_state_and_nothing_else():
    model = make("mag")
    exact, every = run(model, 4, "block"), run(model, 4, "block", truncate=16)
    assert every[0] == exact[0]
    half = run(model, 4, "block", truncate=32)
    assert half[0] == exact[0]
    name = "layers.0.memory.k_proj.weight"
    assert not torch.allclose(every[1][name], exact[1][name], rtol=1e-6)
    assert not torch.allclose(every[1][name], half[1][name], rtol=1e-6)
    for n, gradient in detached(model, 16).items():
        torch.testing.assert_close(every[1][n], gradient, rtol=1e-9, atol=1e-12)


def detached(model, length):
    """The gradients by hand: each `length` tokens on the detached state of those before."""
    tokens, labels, positions = rows()
    model.zero_grad()
    state = None
    for here in (slice(start, start + length) for start in range(0, TOKENS, length)):
        out = model(
            tokens[:, here], labels=labels[:, here], positions=positions[:, here], state=state, num_items_in_batch=100
        )
        out.loss.backward()
        state = out.state.detach()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def test_a_config_counts_truncation_in_tokens():
    """Every 32 of 64 tokens, in segments of 16."""
    model = make("mag")
    config = Config(
        model.config,
        DataConfig(seq_len=TOKENS),
        TrainConfig(micro_batch=2, global_batch=2, truncate_state_gradient_every=32),
        ParallelConfig(segments_per_rank=4),
    )
    expected = detached(model, 32)
    model.zero_grad()
    engine = build_engine(config, model, Mesh(torch.device("cpu")))
    engine.forward_backward([Batch(*rows())], 100)
    for n, p in engine.model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=1e-9, atol=1e-12)


def test_parameter_hooks_see_one_gradient_per_backward_pass():
    model = make("lmm")
    seen = []
    model.layers[0].memory.q_proj.weight.register_hook(lambda g: seen.append(g.clone()))
    _, gradients = run(model, 4, "segment")
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], gradients["layers.0.memory.q_proj.weight"])


def test_without_gradients_nothing_is_kept():
    model = make("mal")
    tokens, labels, positions = rows()
    stage = SegmentedStage(Stage(model, range(LAYERS)), LocalLink(), 4, "none")
    with torch.no_grad():
        found = stage(tokens, positions=positions, labels=labels)
        expected = model(tokens, labels=labels, positions=positions, num_items_in_batch=1).loss
    assert not found.requires_grad
    torch.testing.assert_close(found.sum(), expected)
