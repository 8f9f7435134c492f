"""Muon against torch's own, and against its formulas written down in float64."""

import copy

import pytest
import torch
from torch import nn

from titans_pretrain import build_model
from titans_pretrain.config import MemoryConfig, ModelConfig, TrainConfig
from titans_pretrain.training import muon
from titans_pretrain.training.muon import Muon, orthogonalized
from titans_pretrain.training.optimizer import build_optimizer, set_learning_rate

TRAIN = TrainConfig(optimizer="muon", lr=0.01, weight_decay=0.3, muon_momentum=0.9)


@pytest.fixture
def model() -> nn.Module:
    memory = MemoryConfig(heads=4, chunk_size=4)
    torch.manual_seed(0)
    return build_model(
        ModelConfig(
            variant="mac", dim=32, layers=2, heads=4, vocab_size=64, window=8, persistent_tokens=3, tie_embeddings=False,
            memory=memory,
        )
    )  # fmt: skip


def gradients(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {n: torch.randn(p.shape, generator=draw).to(p.dtype) for n, p in model.named_parameters()}


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(4)) -> dict[str, torch.Tensor]:
    for step in steps:
        for (_, p), grad in zip(model.named_parameters(), gradients(model, step).values(), strict=True):
            p.grad = grad
        set_learning_rate(optimizer, TRAIN.lr / (1 + step))
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_hidden_matrices_are_muons_and_nothing_else_is(model):
    optimizer = build_optimizer(model, TRAIN)
    names = {p: n for n, p in model.named_parameters()}
    found = {names[p] for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    layer = {
        "retrieve_proj.weight",
        *(f"attention.{x}_proj.weight" for x in "qkvo"),
        *(f"memory.{x}_proj.weight" for x in "qkvgo"),
        *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    }
    assert found == {f"layers.{i}.{name}" for i in range(2) for name in layer}
    others = {names[p]: group["weight_decay"] for group in optimizer.param_groups[1:] for p in group["params"]}
    assert found | others.keys() == set(names.values()) and not found & others.keys()
    decayed = {name for name, decay in others.items() if decay == 0.3}
    small = {*(f"{x}_conv" for x in "qkv"), *(f"{x}_proj.weight" for x in ("forget", "momentum", "lr"))}
    assert decayed == {f"layers.{i}.memory.{name}" for i in range(2) for name in small} | {"lm_head.weight"}


def test_it_is_torchs_muon_and_torchs_adamw_to_the_bit(model):
    twin = copy.deepcopy(model)
    ours = trained(model, build_optimizer(model, TRAIN))
    matrices = [p for n, p in twin.named_parameters() if n in muons(model)]
    rest = {n: p for n, p in twin.named_parameters() if n not in muons(model)}
    decayed = [p for n, p in rest.items() if n.endswith(("_conv", "_proj.weight", "lm_head.weight"))]
    kept = [p for n, p in rest.items() if not n.endswith(("_conv", "_proj.weight", "lm_head.weight"))]
    first = torch.optim.Muon(
        matrices, lr=TRAIN.lr, weight_decay=0.3, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    second = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": kept, "weight_decay": 0.0}], lr=TRAIN.lr,
        betas=(TRAIN.beta1, TRAIN.beta2), eps=TRAIN.eps, fused=True,
    )  # fmt: skip

    class Both:
        param_groups = first.param_groups + second.param_groups

        def step(self):
            first.step()
            second.step()

    for name, weight in trained(twin, Both()).items():
        assert torch.equal(weight, ours[name]), name


def muons(model: nn.Module) -> set[str]:
    chosen = {id(p) for group in build_optimizer(model, TRAIN).param_groups if group["muon"] for p in group["params"]}
    return {n for n, p in model.named_parameters() if id(p) in chosen}


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (12, 5), (1, 7)])
def test_the_update_by_its_formulas(monkeypatch, shape):
    """Momentum and Nesterov's look ahead, decoupled decay, singular values through the polynomial five times, the scale."""
    monkeypatch.setattr(muon, "DTYPE", torch.float64)
    weight, bias = nn.Parameter(torch.randn(shape).double()), nn.Parameter(torch.zeros(1).double())
    optimizer = Muon([weight], [{"params": [bias]}], lr=0.1, weight_decay=0.3, momentum=0.9, fused=True)
    expected, average = weight.detach().clone(), torch.zeros(shape).double()
    for step in range(3):
        weight.grad = torch.randn(shape).double()
        set_learning_rate(optimizer, rate := 0.1 / (step + 1))
        optimizer.step()
        average = 0.9 * average + 0.1 * weight.grad if step else 0.1 * weight.grad
        ahead = 0.9 * average + 0.1 * weight.grad
        u, s, v = torch.linalg.svd(ahead, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        expected = expected - rate * 0.3 * expected - rate * 0.2 * max(shape) ** 0.5 * (u * s @ v)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-12)


def test_an_update_is_as_large_as_one_of_adamw():
    update = orthogonalized(torch.randn(64, 256)).float()
    assert 0.15 < update.square().mean().sqrt() * muon.scale_of(update.shape) < 0.25
    assert torch.linalg.svdvals(update).min() > 0.5 and torch.linalg.svdvals(update).max() < 1.3


@pytest.mark.parametrize("harm", [1.0, float("nan"), float("inf")])
def test_a_step_that_is_held_is_as_if_it_had_not_been(model, harm):
    twin = copy.deepcopy(model)
    optimizer, clean = build_optimizer(model, TRAIN), build_optimizer(twin, TRAIN)
    trained(model, optimizer, range(1))
    trained(twin, clean, range(1))
    optimizer.found_inf = torch.ones(())
    for p in model.parameters():
        p.grad = torch.full_like(p, harm)
    optimizer.step()
    optimizer.found_inf.zero_()
    ours, theirs = trained(model, optimizer, range(1, 3)), trained(twin, clean, range(1, 3))
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        for kind, state in clean.state[other].items():
            assert torch.equal(optimizer.state[p][kind], state)
