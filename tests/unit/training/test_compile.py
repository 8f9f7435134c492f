"""train.compile: the compiled step is the step, and no cause of a break in a block's graph is ours but the CPU's kernels."""

from functools import partial

import pytest
import torch

from titans_pretrain.config import load_config
from titans_pretrain.data.reader import Batch
from titans_pretrain.kernels.backends import Backend
from titans_pretrain.kernels.memory_scan import contract
from titans_pretrain.models import build_model
from titans_pretrain.parallel.apply import build_engine
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.training import compile as compiling

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def config_of(variant: str, *overrides: str):
    return load_config("configs/tiny.yaml", [f"model.variant={variant}", "train.warmup_steps=0", *overrides])


def engine_of(config):
    torch.manual_seed(0)
    return build_engine(config, build_model(config.model), Mesh(CPU))


def batches() -> list[Batch]:
    tokens = torch.arange(2 * 128).view(2, 128) * 7 % 512
    return [Batch(tokens, tokens.roll(-1, 1), (torch.arange(128) % 64).expand(2, -1).contiguous())]


def two_steps(config) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, norms and the loss of an evaluation; the weights."""
    engine = engine_of(config)
    numbers = []
    for _ in range(2):
        loss = engine.forward_backward(batches(), 256)
        numbers += [float(loss), float(engine.update(1e-3, loss))]
    return [*numbers, engine.evaluate(batches())], engine.model.state_dict()


def check(variant: str, *overrides: str) -> None:
    eager, compiled = (two_steps(config_of(variant, *overrides, f"train.compile={on}")) for on in ("false", "true"))
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    assert compiled[1].keys() == eager[1].keys()
    for name, weight in eager[1].items():
        torch.testing.assert_close(compiled[1][name], weight, rtol=1e-4, atol=1e-4)  # a tenth of a step of AdamW


def test_two_compiled_steps_equal_eager_ones(monkeypatch):
    """Everything but the code that a C++ compiler makes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    check("transformer", "model.layers=1", "model.window=96")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "overrides"),
    [
        ("lmm", []),
        ("mag", ["model.window=96", "train.recompute=block"]),
        ("mac", ["train.recompute=segment", "parallel.segments_per_rank=2"]),
        ("mal", ["train.precision=bf16"]),
    ],
)
def test_two_compiled_steps_equal_eager_ones_in_every_layout(variant, overrides, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    if "train.precision=bf16" in overrides:  # rounds where eager code does not; a bound is all that can be had
        eager, compiled = (two_steps(config_of(variant, *overrides, f"train.compile={on}")) for on in ("false", "true"))
        assert compiled[0] == pytest.approx(eager[0], rel=2e-2)
    else:
        check(variant, *overrides)


@pytest.mark.slow
def test_with_the_cpu_compiler():
    check("lmm", "model.layers=1")


@pytest.mark.parametrize(
    "variant", ["mac", "mag", *(pytest.param(x, marks=pytest.mark.slow) for x in ("lmm", "mal", "transformer"))]
)
def test_a_block_is_one_graph_around_a_kernel_that_can_be_traced(variant, monkeypatch):
    """As on a GPU, where the scan is an operator of its own: here something that is none stands in for it."""

    def scan(q, k, v, forget, momentum, lr, state, **_):
        return q * lr.sum(-1, keepdim=True) + (k * v * forget + momentum).sum(1, keepdim=True), state

    monkeypatch.setattr(contract, "SCAN", (Backend("stand-in", scan),))
    config = config_of(variant)
    torch.manual_seed(0)
    model = build_model(config.model)
    (batch,) = batches()
    tokens, positions = batch.tokens[:, :64], batch.positions[:, :64] % 32  # a window that needs no loop over blocks
    x = model.embed_tokens(tokens)
    by = model.rotations(positions, x.dtype)
    for layer in model.layers:
        expected, _ = layer(x, None, by, positions)
        compiled = torch.compile(layer.forward, dynamic=False, fullgraph=True, backend="eager")
        y, _ = compiled(x, None, by, positions)
        torch.testing.assert_close(y, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # the layers share it


def test_a_cpu_without_a_compiler_is_told(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler on a CPU, and no-such-compiler is not found"):
        engine_of(config_of("lmm", "train.compile=true"))


def test_only_training_compiles(monkeypatch):
    calls = []
    monkeypatch.setattr(compiling.torch, "compile", lambda f, **_: calls.append(f) or f)
    engine_of(config_of("lmm"))
    assert calls == []
    names = list(engine_of(config_of("lmm", "train.compile=true")).model.state_dict())
    assert len(calls) == 2 and names == list(build_model(config_of("lmm").model).state_dict())
