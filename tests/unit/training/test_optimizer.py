import math

import pytest
import torch
from torch import nn

from titans_pretrain.config import TrainConfig
from titans_pretrain.training.optimizer import build_optimizer, learning_rate


def test_schedule_by_hand():
    train = TrainConfig(steps=110, warmup_steps=10, lr=1.0, min_lr=0.1)
    assert learning_rate(1, train) == pytest.approx(0.1)
    assert learning_rate(10, train) == 1.0
    assert learning_rate(60, train) == pytest.approx(0.55)  # half of the cosine
    assert learning_rate(35, train) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(110, train) == pytest.approx(0.1)
    rates = [learning_rate(step, train) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_warm_up_stable_decay_by_hand():
    train = TrainConfig(steps=100, warmup_steps=10, lr=1.0, min_lr=0.1, schedule="wsd", decay_steps=16)
    assert {learning_rate(step, train) for step in range(10, 85)} == {1.0}
    assert learning_rate(88, train) == pytest.approx(1 - 0.9 * 0.5)
    assert learning_rate(93, train) == pytest.approx(1 - 0.9 * 0.75)
    assert learning_rate(100, train) == pytest.approx(0.1)
    longer = TrainConfig(steps=180, warmup_steps=10, lr=1.0, min_lr=0.1, schedule="wsd", decay_steps=16)
    assert all(
        learning_rate(step, train) == learning_rate(step, longer) for step in range(1, 85)
    )  # a branch from there


def test_a_constant_rate():
    train = TrainConfig(steps=20, warmup_steps=4, lr=1.0, schedule="constant")
    assert [learning_rate(step, train) for step in (2, 4, 5, 20)] == [0.5, 1.0, 1.0, 1.0]


def test_decay_steps_belong_to_their_schedule():
    for wrong in ({"schedule": "wsd"}, {"schedule": "wsd", "steps": 5, "decay_steps": 6}, {"decay_steps": 3}):
        with pytest.raises(ValueError, match="train.decay_steps"):
            TrainConfig(**wrong)


def test_schedule_without_warm_up_starts_below_the_peak_and_ends_at_the_minimum():
    train = TrainConfig(steps=2, warmup_steps=0, lr=1.0, min_lr=0.0)
    assert [learning_rate(step, train) for step in (1, 2)] == pytest.approx([0.5, 0.0])


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(5, 4)
            self.projection = nn.Linear(4, 4)
            self.norm = nn.RMSNorm(4)
            self.persistent = nn.Parameter(torch.zeros(3, 4))
            self.memory = nn.Module()
            self.memory.weights = nn.ParameterList([nn.Parameter(torch.zeros(2, 4, 4))])
            self.memory.query = nn.Linear(4, 4, bias=False)
            self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    model = Block()
    groups = build_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    names = {p: n for n, p in model.named_parameters()}
    by_decay = {group["weight_decay"]: sorted(names[p] for p in group["params"]) for group in groups}
    assert by_decay == {
        0.3: ["memory.query.weight", "projection.weight"],
        0.0: ["embed_tokens.weight", "memory.weights.0", "norm.weight", "persistent", "projection.bias"],
    }
