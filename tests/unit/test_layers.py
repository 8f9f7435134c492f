"""Layers by themselves: memory, attention and feed-forward part need no language model."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from titans_pretrain.config.model import MemoryConfig
from titans_pretrain.models.attention import AttentionLayer
from titans_pretrain.models.linear import GateProjection
from titans_pretrain.models.memory import MemoryLayer
from titans_pretrain.models.mlp import SwiGLU
from titans_pretrain.models.rotary import rotate, rotation

DIM = 32


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attention(**options):
    torch.manual_seed(0)
    return AttentionLayer(DIM, 8, window=5, **options).double()


def turned(layer, tokens):
    return rotation(torch.arange(tokens)[None], layer.rotary_dim, 10000.0, torch.float64)


def test_the_example_of_the_documentation_runs():
    text = (Path(__file__).parents[2] / "docs/models.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["y"].shape == names["x"].shape
    assert all(p.isfinite().all() for p in names["memory"].parameters())


def test_layers_go_on_from_their_state():
    memory, x = MemoryLayer(DIM, MemoryConfig(heads=2, chunk_size=4)).double(), normal(2, 11, DIM)
    whole, _ = memory(x)
    first, state = memory(x[:, :6])
    torch.testing.assert_close(torch.cat((first, memory(x[:, 6:], state)[0]), 1), whole)
    layer = attention()
    cos, sin = turned(layer, 11)
    whole, _ = layer(x, None, (cos, sin))
    first, kv = layer(x[:, :6], None, (cos[:, :6], sin[:, :6]))
    torch.testing.assert_close(torch.cat((first, layer(x[:, 6:], kv, (cos[:, 6:], sin[:, 6:]))[0]), 1), whole)
    mlp = SwiGLU(DIM, 48).double()
    expected = (nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: MemoryLayer(DIM, MemoryConfig(heads=3)), "dim=32 is not divisible by heads=3 of the memory"),
        (lambda: AttentionLayer(DIM, 5), "dim=32 is not divisible by heads=5; or give head_dim"),
        (lambda: AttentionLayer(DIM, 8, kv_heads=3), "heads=8 is not divisible by kv_heads=3"),
    ],
)
def test_heads_that_do_not_divide_are_one_line(make, told):
    with pytest.raises(ValueError, match=told):
        make()


@pytest.mark.parametrize("options", [{}, {"head_dim": 6}, {"qk_norm": True}], ids=str)
def test_grouped_queries_are_as_many_heads_with_repeated_keys_and_values(options):
    """Query head i reads key/value head i // (heads / kv_heads), as Ainslie et al. 2023 have it; the state holds kv_heads."""
    grouped, full = attention(kv_heads=2, **options), attention(**options)
    size = grouped.k_proj.weight.shape[0] // 2
    with torch.no_grad():
        for name, p in full.named_parameters():
            value = dict(grouped.named_parameters())[name]
            if name.startswith(("k_proj", "v_proj")):
                value = torch.cat([value.unflatten(0, (2, size))[i // 4] for i in range(8)])
            p.copy_(value)
    x, persistent, by = normal(2, 13, DIM), normal(3, DIM, seed=1), turned(grouped, 13)
    y, (k, v) = grouped(x, None, by, None, persistent)
    expected, (all_k, all_v) = full(x, None, by, None, persistent)
    torch.testing.assert_close(y, expected)
    assert k.shape == v.shape == (2, 4, 2, size)
    torch.testing.assert_close(k.repeat_interleave(4, 2), all_k)
    torch.testing.assert_close(v.repeat_interleave(4, 2), all_v)
    assert k.untyped_storage().nbytes() == k.nbytes  # no view into what was read


def test_head_dim_is_independent_of_the_width():
    layer = attention(head_dim=6, kv_heads=4)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes["q_proj.weight"] == (48, DIM) and shapes["o_proj.weight"] == (DIM, 48)
    assert shapes["k_proj.weight"] == shapes["v_proj.weight"] == (24, DIM)
    assert layer.rotary_dim == 2


def test_queries_and_keys_are_normed_before_they_are_turned():
    """By hand, and persistent keys alike: root mean square 1 times the learned weight, over each head."""
    layer, x = attention(qk_norm=True, kv_heads=2), normal(2, 7, DIM)
    with torch.no_grad():
        layer.q_norm.weight.copy_(normal(4, seed=2))
        layer.k_norm.weight.copy_(normal(4, seed=3))
    still = rotation(torch.zeros(1, 7, dtype=torch.int64), layer.rotary_dim, 10000.0, torch.float64)  # turns by nothing

    def normed(y, norm):
        y = y.unflatten(-1, (-1, 4))
        return y * (y.square().mean(-1, keepdim=True) + 1e-6) ** -0.5 * norm.weight

    keys = normed(x @ layer.k_proj.weight.T, layer.k_norm)
    torch.testing.assert_close(layer.queries(x, still), normed(x @ layer.q_proj.weight.T, layer.q_norm))
    torch.testing.assert_close(layer.keys_values(x, still)[0], keys)
    positionless = layer.positionless(x[0])[0]
    torch.testing.assert_close(positionless[..., 2:], keys[0][..., 2:])
    assert not positionless[..., :2].any()
    by = turned(layer, 7)
    torch.testing.assert_close(layer.queries(x, by), rotate(normed(x @ layer.q_proj.weight.T, layer.q_norm), by))
    torch.testing.assert_close(layer.keys_values(x, by)[0], rotate(keys, by))
    assert not torch.allclose(layer.queries(x, by), layer.queries(x, still))


def test_gates_keep_their_values_apart_under_autocast():
    """Of 2,048 alphas near sigmoid(-6), a sum in bfloat16 would leave about a hundred."""
    torch.manual_seed(0)
    layer = MemoryLayer(256, MemoryConfig(heads=1))
    x = normal(1, 2048, 256, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        alpha = layer._gates(x, None)[0]
    assert alpha.dtype == torch.float32 and alpha.unique().numel() > 1000


def test_gates_are_linear_modules_that_hooks_see():
    layer = MemoryLayer(DIM, MemoryConfig(heads=2))
    seen = []
    for name in ("forget_proj", "momentum_proj", "lr_proj"):
        module = getattr(layer, name)
        assert isinstance(module, nn.Linear) and isinstance(module, GateProjection)
        module.register_forward_hook(lambda _, args, y, name=name: seen.append(name))
    layer(normal(1, 5, DIM, dtype=torch.float32))
    assert seen == ["forget_proj", "momentum_proj", "lr_proj"]


def row_gradient(scale: float, dtype=torch.float32) -> float:
    """Norm of the gradient of the input and of all parameters, with a run of rows that are `scale` times the size of the others."""
    torch.manual_seed(0)
    layer = MemoryLayer(64, MemoryConfig(heads=2)).to(dtype)
    x = normal(2, 96, 64, dtype=dtype)
    x[:, 20:56] *= scale
    x.requires_grad_()
    y, state = layer(x)
    loss = (y * normal(2, 96, 64, seed=1, dtype=dtype)).sum() + sum(w.square().mean() for w in state.memory.weights)
    loss.backward()
    gradients = [x.grad, *(p.grad for p in layer.parameters())]
    assert all(g.isfinite().all() for g in gradients)
    return torch.stack([g.norm() for g in gradients]).norm().item()


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-12, 0.0])
def test_rows_near_zero_are_harmless(scale):
    assert row_gradient(scale) < 10 * row_gradient(1.0)
