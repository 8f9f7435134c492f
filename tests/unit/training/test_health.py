"""What is told of the memory layers, against what the layers themselves say when asked by hand."""

import pytest
import torch

from titans_pretrain.config import load_config
from titans_pretrain.data.reader import Batch
from titans_pretrain.models import build_model
from titans_pretrain.training.engine import SingleEngine
from titans_pretrain.training.health import NAMES, Health


def build(*overrides: str):
    config = load_config(
        "configs/tiny.yaml", ["model.layers=3", "train.micro_batch=2", "train.global_batch=2", *overrides]
    )
    torch.manual_seed(0)
    return config, build_model(config.model)


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_numbers_by_hand(variant):
    _, model = build(f"model.variant={variant}", "model.persistent_tokens=0")
    tokens = torch.arange(2 * 64).view(2, 64) * 7 % 512
    positions = torch.arange(64).expand(2, 64).clone()
    positions[1, 40:] = -1
    layer = model.layers[1].memory
    calls = []
    handle = layer.register_forward_hook(
        lambda m, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    health = Health(model)
    assert list(health.layers) == [0, 1, 2]
    with health.watching(), torch.no_grad():
        model(tokens, positions=positions)
    handle.remove()
    found = health.read()
    assert set(found) == {f"memory.{i}.{name}" for i in range(3) for name in NAMES}
    ((args, kwargs, (y, state)),) = calls
    with torch.no_grad():
        x, positions = args[0], kwargs["positions"] if "positions" in kwargs else args[2]
        gates = [
            torch.cat([row[p >= 0].flatten() for row, p in zip(g, positions, strict=True)])
            for g in layer._gates(x, None)
        ]
        expected = {}
        for name, gate in zip(("forget", "momentum", "lr"), gates, strict=True):
            expected |= {name: gate.mean(), f"{name}_std": gate.std(correction=0)}
        drift, surprise = [], []
        for b in range(2):
            for h in range(layer.heads):
                start = torch.cat([w[h].flatten() for w in layer.weights])
                now = torch.cat([w[b, h].flatten() for w in state.memory.weights])
                drift.append((now - start).norm() / start.norm())
                surprise.append(torch.cat([s[b, h].flatten() for s in state.memory.surprise]).norm() / start.norm())
        expected |= {"drift": sum(drift) / len(drift), "surprise": sum(surprise) / len(surprise), "output_std": y.std()}
    for name, value in expected.items():
        assert found[f"memory.1.{name}"] == pytest.approx(float(value), rel=1e-4), name
    assert 0 < found["memory.1.drift"] < 10


@pytest.mark.parametrize("recompute", ["none", "block", "segment"])
def test_watching_changes_nothing_and_ends(recompute):
    config, model = build("model.variant=mag", f"train.recompute={recompute}")
    engine = SingleEngine(config, model, torch.device("cpu"))
    model.set_recompute(recompute if recompute != "segment" else "none")
    tokens = torch.arange(2 * 128).view(2, 128) * 7 % 512
    batches = [Batch(tokens, tokens.roll(-1, 1), torch.arange(128).expand(2, -1))]
    gradients = []
    health = Health(model)
    for watched in (True, False):
        if watched:
            with health.watching():
                engine.forward_backward(batches, 256)
        else:
            engine.forward_backward(batches, 256)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad()
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())
    calls = dict(health._calls)
    model(tokens)
    assert calls == health._calls and len(calls) == 3


def test_a_transformer_has_no_memory():
    _, model = build("model.variant=transformer")
    health = Health(model)
    with health.watching():
        model(torch.zeros(1, 32, dtype=torch.int64))
    assert health.read() == {} == health.of_all()
