"""Long-term forecasting on a public CSV: a variant beside the best linear map and the last value repeated, three seeds.

    python -m benchmarks.forecasting ETTh1.csv                                # lmm, horizons 96 and 192, trained on either error
    python -m benchmarks.forecasting ETTh1.csv --variants lmm transformer --horizons 96 192 336 720
    python -m benchmarks.forecasting ETTh1.csv series.patch=8 --out runs/patch-8   # settings over configs/forecasting/ett.yaml
    python -m benchmarks.forecasting ETTh1.csv --report                       # the page anew; nothing is trained

Each point (variant, error that is trained on, horizon, seed) leaves a line in OUT/forecasting.jsonl; those that are there are not done
again. OUT/forecasting.md has the table, pictures beside it. The file is not part of the project; ETTh1.csv is in github.com/zhouhaoyi/ETDataset (CC BY-ND 4.0).
"""

import itertools
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common import (
    Bar,
    argument_parser,
    describe_setup,
    describe_setups,
    finish,
    measure_missing,
    seed_cells,
)
from titans_pretrain.config.load import load_as
from titans_pretrain.evaluation.figures import markdown_table, save_picture
from titans_pretrain.forecasting.config import ForecastConfig
from titans_pretrain.forecasting.run import forecast

BASELINES = ("linear", "repeat last")
MEASURES = ("mse", "mae")


def measure(point: dict, csv: str, runs: Path, settings: Sequence[str]) -> dict:
    """Trains in a new folder and returns the test's errors. Raises SystemExit where a signal stopped it."""
    run_dir = folder(point, runs)
    if run_dir.exists():  # of a training that was stopped: none goes on
        shutil.rmtree(run_dir)
    own = [
        f"series.path={csv}",
        f"series.horizons=[{point['horizon']}]",
        f"model.variant={point['variant']}",
        f"series.loss={point['loss']}",
        f"train.seed={point['seed']}",
        f"run.dir={run_dir}",
    ]
    if code := forecast(load_as(ForecastConfig, "forecasting/ett", [*own, *settings]), lambda line: None):
        raise SystemExit(code)
    (found,) = json.loads((run_dir / "metrics.json").read_text())["horizons"].values()
    return found


def folder(point: dict, runs: Path) -> Path:
    return runs / "{variant}-{loss}-{horizon}-{seed}".format(**point)


def errors(lines: Sequence[dict], horizon: int) -> dict[tuple[str, str], dict[int, float]]:
    """(forecaster, measure) -> seed -> error. The baselines have no seed: they stand with each."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for line in (line for line in lines if line["horizon"] == horizon):
        for name, which in itertools.product((line["variant"], *BASELINES), MEASURES):
            shown = name if name in BASELINES else f"{name}, trained on {line['loss'].upper()}"
            found.setdefault((shown, which), {})[line["seed"]] = line["test"][name][which]
    return {key: found[key] for key in sorted(found, key=lambda key: key[0] in BASELINES)}


def bars(lines: Sequence[dict]) -> Iterator[Bar]:
    """Means over seeds of the first variant that was measured: the error that it was trained on, over the baselines'."""
    for horizon in sorted({line["horizon"] for line in lines}):
        mean = {key: statistics.mean(by_seed.values()) for key, by_seed in errors(lines, horizon).items()}
        for which, baseline in itertools.product(MEASURES, BASELINES):
            name = f"{lines[0]['variant']}, trained on {which.upper()}"
            if (name, which) in mean:
                over = mean[name, which] / mean[baseline, which]
                yield Bar(f"horizon {horizon}: {which.upper()} of {name}, over that of {baseline}", over, 1, "x", False)


def page(name: str, lines: Sequence[dict]) -> str:
    parts = [
        f"# Forecasting of {name}",
        f"    python -m benchmarks.forecasting {name}.csv",
        describe_setups(lines),
        "Errors on the test split, of standardised values; the lookback is 96 rows. The forecasts are those of the last variate, seed 0. "
        "`linear` is fitted to squares alone.",
        "![errors](forecasting.png)",
    ]
    for horizon in sorted({line["horizon"] for line in lines}):
        of_horizon = [line for line in lines if line["horizon"] == horizon]
        seeds = sorted({line["seed"] for line in of_horizon})
        rows = [
            [forecaster, which.upper(), *seed_cells(by_seed, seeds, digits=4)]
            for (forecaster, which), by_seed in errors(lines, horizon).items()
        ]
        seconds = [line["cpu_seconds"] for line in of_horizon]
        parts += [
            f"## Horizon {horizon}",
            f"{of_horizon[0]['test_windows']:,} windows. A training took {min(seconds):.0f} to {max(seconds):.0f} CPU seconds.",
            markdown_table(["forecaster", "error", *(f"seed {s}" for s in seeds), "mean"], rows),
            f"![forecasts](forecasts-{horizon}.png)",
        ]
    return "\n\n".join([*parts, "\n".join(f"- {bar}" for bar in bars(lines))]) + "\n"


def draw(figure, lines: Sequence[dict]) -> None:
    """A point for each seed, a line for the mean; the last value repeated is far off and left out."""
    horizons = sorted({line["horizon"] for line in lines})
    for axes, (horizon, which) in zip(
        figure.subplots(1, 2 * len(horizons)), itertools.product(horizons, MEASURES), strict=True
    ):
        shown = {key[0]: v for key, v in errors(lines, horizon).items() if key[1] == which and key[0] != "repeat last"}
        for at, by_seed in enumerate(shown.values()):
            axes.hlines(statistics.mean(by_seed.values()), at - 0.3, at + 0.3, color=f"C{at}")
            axes.plot([at] * len(by_seed), list(by_seed.values()), "o", color=f"C{at}", markersize=4)
        axes.set_xticks(range(len(shown)), [name.replace(", trained on ", "\n") for name in shown])
        axes.margins(x=0.2)
        axes.set_title(f"{which.upper()}, horizon {horizon}")


def report(name: str, lines: Sequence[dict], out: Path, runs: Path) -> None:
    save_picture(out / "forecasting.png", lambda figure: draw(figure, lines), (10, 3.5))
    for line in lines:
        forecasts = folder(line, runs) / f"horizon-{line['horizon']}/forecasts.png"
        if (line["seed"], line["variant"], line["loss"]) == (0, lines[0]["variant"], "mse") and forecasts.exists():
            shutil.copyfile(forecasts, out / f"forecasts-{line['horizon']}.png")
    (out / "forecasting.md").write_text(page(name, lines))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("csv", metavar="CSV")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--variants", nargs="+", default=["lmm"], metavar="VARIANT")
    parser.add_argument("--losses", nargs="+", choices=MEASURES, default=MEASURES, metavar="ERROR")
    parser.add_argument("--horizons", nargs="+", type=int, default=[96, 192], metavar="ROWS")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(3), metavar="N")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR", help="of lines and page")
    parser.add_argument("--runs", type=Path, default=Path("runs/forecasting"), metavar="DIR", help="of run folders")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_intermixed_args()
    setup = describe_setup(1)
    points = (
        {"variant": variant, "loss": loss, "horizon": horizon, "seed": seed}
        for seed, horizon, variant, loss in itertools.product(args.seeds, args.horizons, args.variants, args.losses)
    )
    lines = measure_missing(
        args.out / "forecasting.jsonl", () if args.report else points,
        lambda point: measure(point, args.csv, args.runs, args.settings), args.settings, setup,
    )  # fmt: skip
    report(Path(args.csv).stem, lines, args.out, args.runs)
    finish(args, setup, lines, list(bars(lines)))


if __name__ == "__main__":
    main()
