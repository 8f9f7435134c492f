"""From a config to forecasts that are measured: a model for each horizon, baselines, a table, pictures."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from titans_pretrain.checkpoint.store import make_folder, write_text
from titans_pretrain.forecasting.baselines import fit_linear, repeat_last
from titans_pretrain.forecasting.config import ForecastConfig
from titans_pretrain.forecasting.metrics import errors
from titans_pretrain.forecasting.model import Forecaster
from titans_pretrain.forecasting.paper import HORIZONS, paper_rows
from titans_pretrain.forecasting.plot import plot_forecasts
from titans_pretrain.forecasting.series import Scaling, Windows, read_series, split_rows, training_scale
from titans_pretrain.training.engine import compute_dtype, pick_device
from titans_pretrain.training.fit import Fitted, fit, open_run, write_results

EVAL_BATCH = 1024  # windows of a variate at once
LOSSES = {"mse": F.mse_loss, "mae": F.l1_loss}


def build_forecaster(config: ForecastConfig, horizon: int) -> Forecaster:
    """Freshly initialised from train.seed."""
    with torch.device("meta"):
        model = Forecaster(config.model, config.series, horizon)
    model.to_empty(device=pick_device(config.train.device))
    torch.manual_seed(config.train.seed)
    model.init_weights()
    return model


def forecast(config: ForecastConfig, say: Callable[[str], None] = print) -> int:
    """Trains in `run.dir` for every horizon and measures on the test split. Returns the exit code: 0, or 128 and the signal's number
    where one ended the training; the best weights so far are there, and are not measured."""
    if not config.series.path:
        raise ValueError("series.path is not set; give the CSV file, e.g. series.path=ETTh1.csv")
    series, name = read_series(config.series.path), Path(config.series.path).stem
    rows = split_rows(len(series.values), config.series.split, name)
    scaling = training_scale(series.values, rows["train"])
    values = scaling.standardized(series.values).float()
    cut = {
        h: {part: Windows(values, rows[part], config.series.lookback, h) for part in rows}
        for h in config.series.horizons
    }
    run_dir = open_run(config, config.run.dir or f"runs/{name}")
    say(f"{name}: {len(series.values):,} rows of {len(series.variates)} variates; run folder {run_dir}")
    results = {"series": name, "lookback": config.series.lookback, "horizons": {}}
    for horizon, windows in cut.items():
        folder = run_dir / f"horizon-{horizon}"
        make_folder(folder)
        fitted, found = _one_horizon(config, horizon, windows, folder, scaling, series.variates, say)
        if fitted.stopped:
            print(
                f"stopped by {fitted.stopped.name}: the best weights, of step {fitted.best_step}, are in {folder}",
                file=sys.stderr,
            )
            return 128 + fitted.stopped
        results["horizons"][str(horizon)] = found
        write_results(run_dir, results)
        write_text(run_dir / "table.md", table(results) + "\n")
    say(table(results))
    return 0


def _one_horizon(
    config: ForecastConfig, horizon: int, windows: dict, folder: Path, scaling: Scaling, variates, say
) -> tuple[Fitted, dict]:
    model, which = build_forecaster(config, horizon), config.series.loss
    device = next(model.parameters()).device
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"horizon {horizon}: {'+'.join(config.model.variants)}, {parameters:,} parameters, {len(windows['train']):,} examples"
    )

    def loss(batch) -> torch.Tensor:
        x, y = (part.to(device) for part in batch)
        return LOSSES[which](model(x), y)

    def predict(x: torch.Tensor) -> torch.Tensor:
        with compute_dtype(device, config.train.precision):
            return model(x.to(device)).float().cpu()

    began = time.process_time()
    fitted = fit(
        model, config.train, windows["train"].shuffled(config.train.batch, config.train.seed), loss,
        lambda: errors(predict, windows["validation"], EVAL_BATCH)[which], folder, validated=f"validation_{which}", say=say,
    )  # fmt: skip
    seconds = time.process_time() - began
    if fitted.stopped:
        return fitted, {}
    compared = {
        "+".join(config.model.variants): predict,
        "linear": fit_linear(windows["train"], windows["validation"]),
        "repeat last": repeat_last(horizon),
    }
    test = {name: errors(call, windows["test"], EVAL_BATCH) for name, call in compared.items()}
    for name, found in test.items():
        say(f"horizon {horizon}, test: {name}  MSE {found['mse']:.4f}  MAE {found['mae']:.4f}")
    plot_forecasts(folder / "forecasts.png", compared, windows["test"], scaling, variates)
    return fitted, {
        "test": test,
        f"validation_{which}": fitted.best,
        "steps": fitted.step,
        "best_step": fitted.best_step,
        "parameters": parameters,
        "cpu_seconds": round(seconds, 1),
        "test_windows": windows["test"].count,
    }


def table(results: dict) -> str:
    """The test errors of metrics.json in Markdown, with the paper's rows for the same data set where it has them."""
    horizons = list(results["horizons"])
    lines = [
        f"Test MSE / MAE of {results['series']}, standardised values, lookback {results['lookback']}",
        "",
        "| | " + " | ".join([*(f"horizon {h}" for h in horizons), "mean"]) + " |",
        "|---|" + "---|" * (len(horizons) + 1),
    ]

    def line(name: str, cells: list[str]) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    tests = [results["horizons"][h]["test"] for h in horizons]
    for name in tests[0]:
        pairs = [(test[name]["mse"], test[name]["mae"]) for test in tests]
        mean = tuple(sum(column) / len(pairs) for column in zip(*pairs))
        lines.append(line(name, [f"{mse:.3f} / {mae:.3f}" for mse, mae in (*pairs, mean)]))
    rows = paper_rows(results["series"])
    for name, (mse, mae) in rows.items():
        lines.append(line(f"paper: {name}", [""] * len(horizons) + [f"{mse:.3f} / {mae:.3f}"]))
    if rows and [int(h) for h in horizons] != list(HORIZONS):
        lines += ["", f"The paper's rows are means over the horizons {', '.join(map(str, HORIZONS))}."]
    return "\n".join(lines)
