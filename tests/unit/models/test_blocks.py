"""Pieces of the blocks: the gate's two sides, and what a fresh model's weights are drawn from."""

import math

import pytest
import torch
from torch.testing import assert_close

from titans_pretrain.config.model import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.models import build_model


def build(variant, **options):
    torch.manual_seed(0)
    base = dict(dim=16, layers=1, heads=2, vocab_size=31, window=6, persistent_tokens=2, ffn_dim=24)
    config = ModelConfig(
        variant, memory=MemoryConfig(heads=2, chunk_size=4), mac=MacConfig(segment=8), **(base | options)
    )
    return build_model(config).double()


def mixed(model, x):
    """What the mixer of a one-layer model adds to its input x [B, T, dim]."""
    block = model.layers[0]
    torch.nn.init.zeros_(block.mlp.down_proj.weight)
    found = []
    hooks = [
        block.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0])),
        block.register_forward_hook(lambda _, arguments, out: found.append(out[0])),
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    before, after = found
    return after - before


@pytest.mark.parametrize("variant", ["mag", "mac"])
def test_the_gates_two_sides(variant):
    """RMSNorm(y) * sigmoid(RMSNorm(m)): attention passes, memory decides how much of it (between none and all)."""
    model = build(variant)
    gate = model.layers[0].gate
    with torch.no_grad():
        gate.y_norm.weight.uniform_(0.5, 2.0)
        gate.m_norm.weight.uniform_(0.5, 2.0)
    y, m = torch.randn(2, 3, 5, 16, dtype=torch.float64)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    out = gate(y, m)
    assert_close(out, norm(y, gate.y_norm.weight) / (1 + (-norm(m, gate.m_norm.weight)).exp()), rtol=1e-12, atol=1e-12)
    assert (out.abs() < norm(y, gate.y_norm.weight).abs()).all()

    tokens = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(1))
    block = model.layers[0]
    kept = block.memory.o_proj.weight.detach().clone()
    whole = mixed(model, tokens)
    torch.nn.init.zeros_(block.memory.o_proj.weight)
    half = mixed(model, tokens)  # a memory that says nothing lets half of the attention through
    size = (2 * half / gate.y_norm.weight).square().mean(-1)
    assert_close(size, torch.ones_like(size), rtol=0.3, atol=0)
    assert (whole - half).abs().max() > 1e-3
    with torch.no_grad():
        block.memory.o_proj.weight.copy_(kept)
        block.attention.o_proj.weight.zero_()
    assert not mixed(model, tokens).any()  # nothing to let through


@pytest.mark.parametrize(
    "variant, queries", [("lmm", 0), ("mac", 0), ("mac", 64), ("mag", 0), ("mal", 0), ("transformer", 0)]
)
def test_initialisation(variant, queries):
    """Projections N(0, init_std); those into the residual stream smaller by sqrt(2 layers); biases of the gates; norms at 1."""
    dim, layers = 128, 3
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(
            variant,
            dim=dim,
            layers=layers,
            heads=4,
            vocab_size=257,
            persistent_tokens=64,
            tie_embeddings=False,
            memory=MemoryConfig(depth=3, heads=2),
            mac=MacConfig(segment=512, memory_tokens=queries),
            qk_norm=True,
        )
    )
    std = math.sqrt(2 / (5 * dim))
    residual = std / math.sqrt(2 * layers)
    seen = set()
    for name, p in model.named_parameters():
        owner, kind = name.split(".")[-2:]
        seen.add(owner)
        if "norm" in owner:
            assert (p == 1).all(), name
        elif kind == "bias":
            assert (p == (-6.0 if owner == "forget_proj" else 0.0)).all(), name
        else:
            wanted = std
            if owner in ("o_proj", "down_proj"):
                wanted = residual
            elif name.endswith("_conv"):
                wanted = 0.5  # four taps
            elif owner == "weights":  # of the memory, three layers from 64 over 256 to 64
                wanted = {"0": 1.0, "1": 1 / 16, "2": 1.0}[kind]
            elif name.endswith(("persistent", "memory_queries")):
                wanted = 1.0
            noise = 5 * wanted / math.sqrt(2 * p.numel())
            assert abs(p.std().item() - wanted) < noise, f"{name}: {p.std():.4f}, not {wanted:.4f}"
            assert abs(p.mean().item()) < 5 * wanted / math.sqrt(p.numel()), name
    assert {"embed_tokens", "lm_head", "down_proj", "o_proj"} <= seen
