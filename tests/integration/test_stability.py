"""The memory stays finite where real text and padding would break it: runs of one token, and long random streams."""

import math

import pytest
import torch

from benchmarks.recall import VOCAB, recall_config, stress, train
from titans_pretrain.config.model import MemoryConfig, ModelConfig
from titans_pretrain.models import build_model

LINEAR = {"memory.depth": 1, "memory.residual_norm": False, "memory.step": "telescoped", "memory.max_lr": 0.5}
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def default_size(**memory):
    """The default memory in one layer of the default width."""
    torch.manual_seed(0)
    return build_model(ModelConfig(variant="lmm", layers=1, vocab_size=VOCAB, memory=MemoryConfig(**memory)))


def assert_finite(model, dtype, random_tokens):
    equal, random = stress(model, tokens=4096, random_tokens=random_tokens, dtype=dtype)
    assert math.isfinite(equal) and math.isfinite(random), (
        f"largest weight {equal} after equal tokens, {random} after random"
    )


@precisions
@pytest.mark.parametrize(
    "memory",
    [{}, dict(depth=1, residual_norm=False, step="telescoped", max_lr=0.5)],
    ids=["default", "linear-telescoped"],
)
def test_before_training(memory, dtype):
    assert_finite(default_size(**memory), dtype, 65536)


@pytest.mark.parametrize("options", [{}, LINEAR], ids=["default", "linear-telescoped"])
def test_gates_at_their_maximum(options):
    """Whatever the gates learn: momentum and step at their largest, hardly any forgetting."""
    torch.manual_seed(0)
    model = build_model(recall_config(**options))
    with torch.no_grad():
        for layer in model.layers:
            layer.memory.momentum_proj.bias.fill_(6.0)
            layer.memory.lr_proj.bias.fill_(6.0)
            layer.memory.forget_proj.bias.fill_(-12.0)
    assert_finite(model, torch.float32, 4096)


def test_plain_linear_memory_does_break():
    """The stress is one: without the telescoped step the linear memory does not survive it."""
    torch.manual_seed(0)
    model = build_model(recall_config(**(LINEAR | {"memory.step": "plain"})))
    assert math.isnan(stress(model)[0])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, LINEAR], ids=["default", "linear-telescoped"])
def test_after_training(options):
    """Learns recall far past the window, and still survives."""
    torch.manual_seed(0)
    model = build_model(recall_config(**options))
    best = max(accuracy for _, accuracy in train(model, 600))
    assert best > 0.9
    for dtype in (torch.float32, torch.bfloat16):
        assert_finite(model, dtype, 65536)
