"""`titans-pretrain forecast` from a CSV to a measured run folder."""

import csv
import json
import math
import os
import random
import signal

import pytest
import torch

from titans_pretrain import cli
from titans_pretrain.config.load import load_as
from titans_pretrain.forecasting.config import ForecastConfig
from titans_pretrain.forecasting.metrics import errors
from titans_pretrain.forecasting.run import build_forecaster, forecast, table
from titans_pretrain.forecasting.series import Windows, read_series, split_rows, training_scale
from titans_pretrain.training.fit import load_weights


@pytest.fixture(scope="module")
def csv_file(tmp_path_factory):
    """Two daily curves with a little noise."""
    path, draw = tmp_path_factory.mktemp("series") / "waves.csv", random.Random(0)
    with open(path, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["date", "a", "b"])
        for i in range(500):
            noise = [0.05 * draw.gauss(0, 1) for _ in range(2)]
            lines.writerow([f"hour {i}", 3 * math.sin(i / 3) + noise[0], math.cos(i / 4) + noise[1] + 10])
    return path


@pytest.fixture
def settings(csv_file, tmp_path):
    return [
        f"series.path={csv_file}", "series.lookback=24", "series.horizons=[6]", "series.patch=6", "series.stride=3", "model.dim=16",
        "model.layers=1", "model.persistent_tokens=2", "train.steps=60", "train.batch=64", "train.lr=1e-2", "train.warmup_steps=5",
        "train.eval_every=20", f"run.dir={tmp_path}/run",
    ]  # fmt: skip


def test_a_run_learns_is_measured_and_is_not_written_over(settings, tmp_path, capsys):
    command = ["forecast", "forecasting/ett", *settings, "series.horizons=[6,9]"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    run = tmp_path / "run"
    results = json.loads((run / "metrics.json").read_text())
    for horizon in ("6", "9"):
        test = results["horizons"][horizon]["test"]
        assert test["lmm"]["mse"] < 0.2 * test["repeat last"]["mse"] and test["linear"]["mse"] < 0.1
        assert (run / f"horizon-{horizon}/forecasts.png").stat().st_size > 10_000
        lines = [json.loads(line) for line in (run / f"horizon-{horizon}/metrics.jsonl").read_text().splitlines()]
        assert sum("loss" in line for line in lines) == 60
        validations = {line["step"]: line["validation_mse"] for line in lines if "validation_mse" in line}
        assert list(validations) == [20, 40, 60]
        assert results["horizons"][horizon]["validation_mse"] == min(validations.values())
    assert (run / "table.md").read_text().strip() in out and "| repeat last |" in out and "paper" not in out
    config = load_as(ForecastConfig, run / "config.yaml")
    assert config.series.horizons == [6, 9] and config.run.dir == str(run)

    # the best weights are on disk, and give the number that was measured
    model = build_forecaster(config, 9).eval()
    load_weights(model, run / "horizon-9/best.safetensors")
    values = read_series(config.series.path).values
    rows = split_rows(len(values), "auto", "waves")
    scaled = training_scale(values, rows["train"]).standardized(values).float()
    found = errors(model, Windows(scaled, rows["test"], 24, 9), 50)
    assert found == pytest.approx(results["horizons"]["9"]["test"]["lmm"], rel=1e-5)

    assert cli.main(command) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(("loss", "power"), [("mse", 2), ("mae", 1)])
def test_the_loss_is_that_of_the_config(loss, power, settings, csv_file, tmp_path):
    """Of the first step, whose forecast is the window's mean."""
    of_one_step = ["train.steps=1", "train.eval_every=1", f"series.loss={loss}"]
    assert cli.main(["forecast", "forecasting/ett", *settings, *of_one_step]) == 0
    first, validated = map(json.loads, (tmp_path / "run/horizon-6/metrics.jsonl").read_text().splitlines())
    values = read_series(csv_file).values
    rows = split_rows(len(values), "auto", "waves")
    scaled = training_scale(values, rows["train"]).standardized(values).float()
    x, y = next(Windows(scaled, rows["train"], 24, 6).shuffled(64, 0))
    assert first["loss"] == pytest.approx(float(((x.mean(1, keepdim=True) - y).abs() ** power).mean()), rel=1e-5)
    model = build_forecaster(load_as(ForecastConfig, tmp_path / "run/config.yaml"), 6).eval()
    load_weights(model, tmp_path / "run/horizon-6/best.safetensors")
    windows = Windows(scaled, rows["validation"], 24, 6)
    x, y = windows[torch.arange(len(windows))]
    error = float(((model(x) - y).detach().abs() ** power).mean())
    assert validated[f"validation_{loss}"] == pytest.approx(error, rel=1e-5)


def test_a_signal_leaves_the_best_weights(settings, tmp_path, capsys):
    config = load_as(ForecastConfig, "forecasting/ett", [*settings, "train.steps=100000"])

    def say(line: str) -> None:
        if "(best)" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    assert forecast(config, say) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM: the best weights, of step 20," in capsys.readouterr().err
    assert not (tmp_path / "run/metrics.json").exists()
    load_weights(build_forecaster(config, 6), tmp_path / "run/horizon-6/best.safetensors")


def test_errors_are_one_line(settings, capsys, tmp_path):
    def told(*arguments: str) -> str:
        assert cli.main(["forecast", "forecasting/ett", *arguments]) == 2
        return capsys.readouterr().err

    assert "series.path is not set" in told()
    assert "No such file" in told("series.path=gone.csv")
    assert "unknown key series.lokback; did you mean series.lookback?" in told("series.lokback=3")
    assert "'train.lr=x'" in told("train.lr=x") and not (tmp_path / "run").exists()
    assert "hold no window of 24 and 400 rows" in told(*settings, "series.horizons=[400]")
    assert not (tmp_path / "run").exists()


def test_the_table_says_what_the_papers_rows_are():
    test = {"lmm": {"mse": 0.5, "mae": 0.25}}
    shown = table(
        {
            "series": "ETTh1",
            "lookback": 96,
            "horizons": {"96": {"test": test}, "192": {"test": {"lmm": {"mse": 0.7, "mae": 0.35}}}},
        }
    )
    assert "| lmm | 0.500 / 0.250 | 0.700 / 0.350 | 0.600 / 0.300 |" in shown
    assert "| paper: Titans (LMM) |  |  | 0.420 / 0.421 |" in shown
    assert "means over the horizons 96, 192, 336, 720" in shown
