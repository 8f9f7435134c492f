"""The short training: which weights it keeps, when it ends, what it leaves behind."""

import itertools
import json
import os
import signal

import pytest
import torch
from torch import nn

from titans_pretrain.config.fit import FitConfig
from titans_pretrain.forecasting.config import ForecastConfig
from titans_pretrain.training.fit import BEST, fit, load_weights, open_run


def run(tmp_path, validations, **settings):
    """A line that is pulled down by 1 in every step; it validates as told. Returns it, what fit said, and each validation's weight."""
    model, weights, found = nn.Linear(1, 1), [], iter(validations)

    def validate() -> float:
        weights.append(model.weight.item())
        assert not model.training and not torch.is_grad_enabled()
        value = next(found)
        return value() if callable(value) else value

    train = FitConfig(
        **({"steps": 8, "eval_every": 2, "lr": 0.1, "min_lr": 0.1, "warmup_steps": 0, "log_every": 3} | settings)
    )
    said = []
    fitted = fit(model, train, itertools.repeat(1.0), lambda x: model.weight.sum() * x, validate, tmp_path, validated="error", say=said.append)  # fmt: skip
    return model, fitted, weights, said


def test_the_best_weights_are_kept_and_come_back(tmp_path):
    model, fitted, weights, said = run(tmp_path, [0.5, 0.1, 0.9, 0.1])
    assert (fitted.step, fitted.best_step, fitted.best, fitted.stopped) == (8, 4, 0.1, None)
    assert model.weight.item() == weights[1] and len(set(weights)) == 4
    other = nn.Linear(1, 1)
    load_weights(other, tmp_path / BEST)
    assert other.weight.item() == weights[1]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert [(line["step"], line["error"]) for line in lines if "error" in line] == [
        (2, 0.5),
        (4, 0.1),
        (6, 0.9),
        (8, 0.1),
    ]
    assert [line.split()[1] for line in said if "loss" in line] == ["3/8", "6/8"]


def test_the_last_step_is_validated_too(tmp_path):
    _, fitted, weights, _ = run(tmp_path, [0.5, 0.4, 0.3], steps=5)
    assert fitted.best_step == fitted.step == 5 and len(weights) == 3


def test_patience(tmp_path):
    _, fitted, _, _ = run(tmp_path, [0.5, 0.6, 0.4, 0.4, 0.5], steps=100, patience=2)
    assert (fitted.step, fitted.best_step) == (10, 6)


def test_a_signal_ends_it_with_the_best_weights(tmp_path):
    def stop() -> float:
        os.kill(os.getpid(), signal.SIGUSR1)
        return 0.7

    model, fitted, weights, _ = run(tmp_path, [0.5, stop], steps=100)
    assert fitted.stopped == signal.SIGUSR1 and (fitted.step, fitted.best_step) == (4, 2)
    assert model.weight.item() == weights[0]


def test_what_is_not_finite(tmp_path):
    with pytest.raises(ValueError, match=r"step 1: loss .*inf.*: not finite; lower train\.lr"):
        model = nn.Linear(1, 1)
        fit(model, FitConfig(), itertools.repeat(0), lambda x: model.weight.sum() * torch.inf, lambda: 0.0, tmp_path, validated="error")  # fmt: skip
    with pytest.raises(ValueError, match=r"no error was found"):
        run(tmp_path, [float("nan")] * 4)


def test_a_folder_is_not_written_over(tmp_path):
    assert (open_run(ForecastConfig(), tmp_path / "a" / "b") / "config.yaml").is_file()
    with pytest.raises(ValueError, match=r"holds a run already; give another folder"):
        open_run(ForecastConfig(), tmp_path / "a" / "b")
    other = nn.Linear(2, 1)
    run(tmp_path, [0.5] * 4)
    with pytest.raises(ValueError, match=r"best\.safetensors does not fit the model"):
        load_weights(other, tmp_path / BEST)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": 0}, r"train\.steps must be 1 or more"),
        ({"patience": -1}, r"train\.patience must be 0 or more"),
        ({"beta2": 1.0}, r"train\.beta2 must lie in \[0, 1\)"),
        ({"lr": 1e-6}, r"train\.min_lr=1e-05 is above train\.lr=1e-06"),
    ],
)
def test_settings_that_do_not_fit(settings, told):
    with pytest.raises(ValueError, match=told):
        FitConfig(**settings)
