"""A training step on CUDA: nothing in it waits for the device, what is not finite changes no weight, and compiled it is the same."""

import pytest
import torch
from test_kernels_on_cuda import no_waiting

from titans_pretrain.config import load_config
from titans_pretrain.data.reader import Batch
from titans_pretrain.models import build_model
from titans_pretrain.parallel.apply import build_engine
from titans_pretrain.parallel.mesh import Mesh


def engine_of(variant: str, device: str, *overrides: str):
    config = load_config(
        "configs/tiny.yaml", [f"model.variant={variant}", f"train.device={device}", "train.warmup_steps=0", *overrides]
    )
    torch.manual_seed(0)
    return build_engine(config, build_model(config.model), Mesh(torch.device(device)))


def batches(device: str) -> list[Batch]:
    tokens = torch.arange(2 * 128).view(2, 128) * 7 % 512
    rows = [tokens, tokens.roll(-1, 1), (torch.arange(128) % 64).expand(2, -1).contiguous()]
    return [Batch(*(x.pin_memory() if device == "cuda" else x for x in rows))]


@pytest.mark.parametrize("recompute", ["none", "block", "segment"])
@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal", "transformer"])
def test_a_step_does_not_wait(variant, recompute, device):
    engine = engine_of(variant, device, f"train.recompute={recompute}", "train.precision=bf16")
    for waits in (True, False):  # what is made once is made in the first
        if waits:
            numbers = _step(engine, device)
        else:
            with no_waiting(device):
                numbers = _step(engine, device)
    assert all(bool(x.isfinite()) for x in numbers)


def _step(engine, device: str):
    loss = engine.forward_backward(batches(device), 256)
    return loss, engine.update(1e-3, loss)


def test_what_is_not_finite_changes_no_weight(device):
    engine = engine_of("mag", device)
    _step(engine, device)
    before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    loss = engine.forward_backward(batches(device), 256)
    engine.update(1e-3, loss * torch.nan)
    _step(engine, device)
    assert all(torch.equal(p, before[n]) for n, p in engine.model.named_parameters())
    states = engine.optimizer.state_dict()["state"].values()
    assert all(float(state["step"]) == 1 for state in states)


@pytest.mark.parametrize("variant", ["mac", "mag"])
def test_a_compiled_step_is_the_step(variant, device):
    eager, compiled = (engine_of(variant, device, f"train.compile={on}") for on in ("false", "true"))
    for _ in range(2):
        a, b = _step(eager, device), _step(compiled, device)
        assert [float(x) for x in b] == pytest.approx([float(x) for x in a], rel=1e-3)
