"""Initial values: none is forgotten, all have their spread, and none depends on what else a process holds."""

import math

import pytest
import torch
from torch import nn

from titans_pretrain.config.model import VARIANTS, MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.models import build_model
from titans_pretrain.models.initialize import initialize, initialize_part, named_parts
from titans_pretrain.models.variants import build_block
from titans_pretrain.parallel.stage import keep_parts, stage_parts


def config(variant="mag", **options):
    return ModelConfig(
        variant,
        **dict(dim=32, layers=4, heads=4, vocab_size=40, persistent_tokens=2, kv_heads=2, qk_norm=True) | options,
    )


CASES = {variant: config(variant) for variant in VARIANTS} | {
    "queries": config("mac", mac=MacConfig(memory_tokens=3), tie_embeddings=False),
    "plain memory": config("lmm", memory=MemoryConfig(residual_norm=False, depth=3, per_layer_gates=True)),
    "pattern": config(pattern=["mag", "lmm", {"variant": "transformer", "window": None}]),
}


def poisoned(c: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        model = build_model(c)
    assert all(t.is_meta for t in model.state_dict().values())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.fill_(math.nan)
    return model


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_a_model_from_the_meta_device_is_left_uninitialised(name):
    model = poisoned(CASES[name])
    model.init_weights()
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if not t.isfinite().all()]
    assert not left
    model(torch.zeros(1, 5, dtype=torch.int64))


@pytest.mark.parametrize("name", CASES)
def test_every_module_initialises_its_own(name):
    """Each block, and each module in it that has parameters, by itself."""
    model = poisoned(CASES[name])
    blocks = [m for m in model.modules() if hasattr(m, "init_weights") and m is not model]
    held = {id(p) for m in blocks for p in m.parameters()}
    assert held == {id(p) for p in model.parameters()}
    for module in blocks:
        module.init_weights()
        assert all(p.isfinite().all() for p in module.parameters())


def test_a_built_model_is_initialised_from_the_global_random_state():
    def built(seed):
        torch.manual_seed(seed)
        return build_model(config()).state_dict()

    one, same, other = built(0), built(0), built(1)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one["embed_tokens.weight"], other["embed_tokens.weight"])
    torch.manual_seed(0)
    assert not torch.equal(one["embed_tokens.weight"], [build_model(config()) for _ in "ab"][1].embed_tokens.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_a_part_does_not_depend_on_what_else_there_is(tied):
    """A pipeline stage, and one block by itself, have the values of the whole model; the global random state is not touched."""
    c = config(tie_embeddings=tied)
    whole = poisoned(c)
    before = torch.random.get_rng_state()
    initialize(whole, 5)
    assert torch.equal(before, torch.random.get_rng_state())
    expected = whole.state_dict()
    stage = poisoned(c)
    keep_parts(stage, stage_parts(c, range(2, 4)))
    initialize(stage, 5)
    assert {n.split(".")[1] for n in stage.state_dict() if n.startswith("layers.")} == {"2", "3"}
    assert all(torch.equal(t, expected[n]) for n, t in stage.state_dict().items())
    block = build_block(c.layer(1))
    initialize_part(block, "layers.1", 5)
    assert all(torch.equal(t, expected["layers.1." + n]) for n, t in block.state_dict().items())


def test_parts_and_seeds_differ():
    model = poisoned(config(tie_embeddings=False))
    assert list(named_parts(model)) == ["embed_tokens", *(f"layers.{i}" for i in range(4)), "norm", "lm_head"]
    initialize(model, 5)
    weight = {n: p.clone() for n, p in model.named_parameters()}
    assert not torch.equal(weight["layers.0.mlp.up_proj.weight"], weight["layers.1.mlp.up_proj.weight"])
    assert not torch.equal(weight["embed_tokens.weight"], weight["lm_head.weight"])
    initialize(model, 6)
    assert not torch.equal(weight["layers.0.mlp.up_proj.weight"], model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("residual_norm", [True, False])
def test_the_spread_of_every_kind_of_parameter(residual_norm):
    """Projections sqrt(2 / (5 dim)), into the residual stream divided by sqrt(2 layers); the memory's weights and gates."""
    torch.manual_seed(0)
    memory = MemoryConfig(heads=2, depth=3, expansion=2, residual_norm=residual_norm)
    shape = dict(dim=128, layers=3, heads=4, vocab_size=500, persistent_tokens=64, ffn_dim=192, tie_embeddings=False)
    queries = {"variant": "mac", "mac": {"memory_tokens": 64}}
    model = build_model(ModelConfig(pattern=["mal", "mac", queries], qk_norm=True, memory=memory, **shape))
    small = (2 / (5 * 128)) ** 0.5
    ends, hidden = (1.0, 1.0) if residual_norm else (64**-0.5, small), 128**-0.5
    expected = {
        "embed_tokens.weight": small, "lm_head.weight": small, "persistent": 1.0, "memory_queries": 1.0,
        "conv": 4**-0.5, "o_proj.weight": small / 6**0.5, "down_proj.weight": small / 6**0.5,
        "weights.0": ends[0], "weights.1": hidden, "weights.2": ends[1], "proj.weight": small,
    }  # fmt: skip
    constants = {"norm.weight": 1.0, "forget_proj.bias": -6.0, "momentum_proj.bias": 0.0, "lr_proj.bias": 0.0}
    seen = set()
    for name, p in model.named_parameters():
        constant = next((end for end in constants if name.endswith(end)), None)
        if constant is not None:
            assert (p == constants[constant]).all(), name
            seen.add(constant)
            continue
        kind = next(end for end in expected if name.endswith(end))
        seen.add(kind)
        tolerance = 5 / (2 * p.numel()) ** 0.5  # five standard errors
        assert p.std().item() == pytest.approx(expected[kind], rel=tolerance), name
        assert abs(p.mean().item()) < 5 * expected[kind] / p.numel() ** 0.5, name
    assert seen == expected.keys() | constants.keys()
