"""Long-term forecasting on a public CSV: a variant beside the best linear map and the last value repeated.

    python -m benchmarks.forecasting ETTh1.csv                                         # lmm and transformer, horizon 96
    python -m benchmarks.forecasting ETTh1.csv --variants lmm --horizons 96 192 336 720
    python -m benchmarks.forecasting ETTh1.csv series.patch=8 train.lr=5e-4            # settings over configs/forecasting/ett.yaml

Run folders stay in --out. The file is not part of the project; ETTh1.csv is in github.com/zhouhaoyi/ETDataset (CC BY-ND 4.0).
"""

import json
from pathlib import Path

from benchmarks.common import Bar, argument_parser, describe_setup, finish


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("csv", metavar="CSV")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--variants", nargs="+", default=["lmm", "transformer"])
    parser.add_argument("--horizons", nargs="+", type=int, default=[96])
    parser.add_argument("--out", default="runs/forecasting", metavar="DIR")
    args = parser.parse_intermixed_args()
    setup = describe_setup(1)
    print("\n".join(f"{name}: {value}" for name, value in setup.items()) + "\n", flush=True)

    from titans_pretrain.config.load import load_as
    from titans_pretrain.forecasting.config import ForecastConfig
    from titans_pretrain.forecasting.run import forecast, table

    points, bars = [], []
    for variant in args.variants:
        own = [f"series.path={args.csv}", f"model.variant={variant}", f"run.dir={args.out}/{variant}"]
        config = load_as(ForecastConfig, "forecasting/ett", [*own, f"series.horizons={args.horizons}", *args.settings])
        if code := forecast(config, lambda line: print(line, flush=True)):
            raise SystemExit(code)
        points.append(json.loads(Path(config.run.dir, "metrics.json").read_text()) | {"variant": variant})
    for horizon, found in points[0]["horizons"].items():
        for other in points[1:]:
            test = other["horizons"][horizon]["test"]
            found["test"] = {args.variants[0]: None, other["variant"]: test[other["variant"]]} | found["test"]
        mse = {name: test["mse"] for name, test in found["test"].items()}
        first = args.variants[0]
        over = mse[first] / mse["linear"]
        bars.append(
            Bar(f"horizon {horizon}: MSE of {first} over that of the linear map", over, 1.05, "x", at_least=False)
        )
    print("\n" + table(points[0]))
    finish(args, setup, points, bars)


if __name__ == "__main__":
    main()
