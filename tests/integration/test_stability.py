"""The memory stays finite where real text and padding would break it: runs of one token, and long random streams."""

import math

import pytest
import torch

from benchmarks.inner_step import LIMIT, MEMORIES, TOKENS, UNDAMPED, gradient_norms
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


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize(
    "memory",
    [{}, dict(depth=1, residual_norm=False, step="telescoped", max_lr=0.5)],
    ids=["default", "linear-telescoped"],
)
@pytest.mark.parametrize("tokens", [8192, pytest.param(65536, marks=pytest.mark.slow)])
def test_before_training(memory, dtype, tokens):
    assert_finite(default_size(**memory), dtype, tokens)


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


def worst_ratio(variant, dtype="float32", only=None, **memory):
    """Norm of the gradient of 4,096 tokens over a transformer's on the same row: the largest over rows."""

    def norms(variant):
        torch.manual_seed(0)
        options = {f"memory.{key}": value for key, value in memory.items()}
        return gradient_norms(build_model(recall_config(variant=variant, **options)), TOKENS, dtype, only)

    found, base = norms(variant), norms("transformer")
    return max(found[row] / base[row] for row in base)


REPETITIVE = ["equal", "period 2"]


@pytest.mark.parametrize(
    "variant", [x if x in ("lmm", "mag") else pytest.param(x, marks=pytest.mark.slow) for x in MEMORIES]
)
def test_gradient_of_repetitive_rows(variant):
    assert worst_ratio(variant, only=REPETITIVE) < LIMIT


@pytest.mark.parametrize(
    "memory",
    [dict(depth=1), *(pytest.param(x, marks=pytest.mark.slow) for x in (dict(depth=3), dict(chunk_size=64)))],
    ids=str,
)
def test_gradient_of_other_memories(memory):
    assert worst_ratio("lmm", only=REPETITIVE, **memory) < LIMIT


def test_gradient_of_the_undamped_step_does_explode():
    """The rows are hard ones."""
    assert worst_ratio("lmm", only=REPETITIVE, **UNDAMPED) > 1e3


@pytest.mark.slow
@precisions
@pytest.mark.parametrize("variant", MEMORIES)
def test_gradient_of_every_row(variant, dtype):
    assert worst_ratio(variant, str(dtype).removeprefix("torch.")) < LIMIT


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


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lmm", "mag"])
def test_gradient_after_training(variant):
    """On every row, both precisions, against a transformer that was trained as long."""
    models = {}
    for name in (variant, "transformer"):
        torch.manual_seed(0)
        models[name] = build_model(recall_config(variant=name))
        list(train(models[name], 300))
    for dtype in ("float32", "bfloat16"):
        found, base = (gradient_norms(models[name], TOKENS, dtype) for name in (variant, "transformer"))
        assert max(found[row] / base[row] for row in base) < LIMIT
