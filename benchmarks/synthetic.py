"""Recall far past the attention window, and state tracking past the lengths of training, by small models trained for minutes.

    python -m benchmarks.synthetic                                                # every problem and variant, three seeds: hours
    python -m benchmarks.synthetic --problems needle --variants lmm mag --seeds 0 # a part
    python -m benchmarks.synthetic --report                                       # the pages anew; nothing is trained

Each point (problem, variant, seed) is trained by configs/synthetic/PROBLEM.yaml and measured, and leaves a line in OUT/synthetic.jsonl;
those that are there are not done again, a training that was stopped goes on. OUT/retrieval.md and OUT/state-tracking.md have the
tables, pictures beside them. What is measured: mqar and needle with every pair at least D tokens before its question, D a multiple of
the window; parity and s5 at multiples of the longest sequence of the training, the last answer of each sequence.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common import Bar, argument_parser, describe_setup, describe_setups, finish, measure_missing, seed_cells
from titans_pretrain.config.load import load_as
from titans_pretrain.evaluation.figures import markdown_table, save_picture
from titans_pretrain.evaluation.model import LanguageModel, open_model
from titans_pretrain.evaluation.run import batches
from titans_pretrain.evaluation.synthetic import Options, Synthetic
from titans_pretrain.evaluation.train_synthetic import SyntheticConfig, train_synthetic

VARIANTS = ("lmm", "mag", "mac", "transformer")
WINDOWS = (2, 8, 32, 64)  # least distances from pair to question
ROOM = 64  # tokens for pairs and questions beside that gap
LENGTHS = (1, 2, 4, 8)  # of state tracking, in longest sequences of the training
PAGES = {
    "retrieval": ("Recall past the window", ("needle", "mqar")),
    "state-tracking": ("State tracking", ("parity", "s5")),
}
PROBLEMS = tuple(problem for _, problems in PAGES.values() for problem in problems)


def tests(config: SyntheticConfig, samples: int) -> Iterator[tuple[str, Options]]:
    """(what it is called in the tables, the sequences) of each measurement of a model."""
    trained = config.synthetic
    if trained.problem in ("mqar", "needle"):
        pairs = {"mqar": 8, "needle": 1}[trained.problem]
        for windows in WINDOWS:
            gap = windows * config.model.window
            yield (
                f"{windows} windows, {gap} tokens",
                Options(trained.problem, [gap + ROOM], samples, trained.vocab, pairs, gap=gap),
            )
    else:
        for times in LENGTHS:
            yield (
                f"{times * max(trained.lengths)} tokens",
                Options(trained.problem, [times * max(trained.lengths)], samples, moved=trained.moved),
            )


def accuracy(model: LanguageModel, options: Options) -> float:
    """Of the answers of recall, of the last answer of each sequence in state tracking."""
    task, results = Synthetic(options, model, None), {}
    for batch in batches(task.items(), 32):
        results |= zip((item.key for item in batch), task.run(batch), strict=True)
    (figures,) = task.figures(results).values()
    return figures["accuracy" if options.problem in ("mqar", "needle") else "last"]


def measure(point: dict, runs: Path, samples: int, settings: Sequence[str]) -> dict:
    """Trains the point's model, or goes on with it, and measures. Raises SystemExit where a signal stopped it."""
    name = f"synthetic/{point['problem']}"
    run_dir = runs / "{problem}-{variant}-{seed}".format(**point)
    fresh, began = not run_dir.exists(), time.process_time()
    overrides = [
        f"model.variant={point['variant']}",
        f"train.seed={point['seed']}",
        f"synthetic.seed={point['seed']}",
        f"run.dir={run_dir}",
        *settings,
    ]
    if code := train_synthetic(name, overrides):
        raise SystemExit(code)
    config, spent = load_as(SyntheticConfig, name, overrides), time.process_time() - began
    model = open_model(run_dir, "cpu")
    found = {told: accuracy(model, options) for told, options in tests(config, samples)}
    return {
        "steps": config.train.steps,
        "cpu_minutes": round(spent / 60, 1) if fresh else None,
        "accuracy": found,
        "chance": config.synthetic.chance,
    }


def bars(lines: Sequence[dict]) -> Iterator[Bar]:
    """Of recall: what memories have to answer, means over seeds, and that attention alone only guesses."""
    for problem, variant in itertools.product(PAGES["retrieval"][1], VARIANTS):
        runs = [line for line in lines if (line["problem"], line["variant"]) == (problem, variant)]
        for told in [told for told in (runs[0]["accuracy"] if runs else ()) if told.startswith(("8 ", "64 "))]:
            mean, memory = statistics.mean(run["accuracy"][told] for run in runs), variant != "transformer"
            limit = 90 if memory else 200 * runs[0]["chance"]
            yield Bar(f"{problem}, {variant}, distance {told}", 100 * mean, limit, "%", at_least=memory)


def page(title: str, problems: Sequence[str], lines: Sequence[dict], picture: str) -> str:
    """Markdown; a cell that was not measured stays empty."""
    parts = [f"# {title}", "    python -m benchmarks.synthetic --problems " + " ".join(problems)]
    parts += [describe_setups(lines), f"![accuracy]({picture})"]
    for problem in problems:
        of_problem = [line for line in lines if line["problem"] == problem]
        if not of_problem:
            continue
        seeds = sorted({line["seed"] for line in of_problem})
        rows = []
        for variant in dict.fromkeys(line["variant"] for line in of_problem):
            runs = {line["seed"]: line["accuracy"] for line in of_problem if line["variant"] == variant}
            for told in of_problem[0]["accuracy"]:
                found = {seed: 100 * accuracy[told] for seed, accuracy in runs.items()}
                rows.append([variant, told, *seed_cells(found, seeds)])
        measured = "answers" if problem in ("mqar", "needle") else "last answers"
        minutes = [line["cpu_minutes"] for line in of_problem if line["cpu_minutes"] is not None]
        parts += [
            f"## {problem}",
            f"Share of {measured} that are right, %; by chance {100 * of_problem[0]['chance']:.2g}."
            + (f" A training took {min(minutes):g} to {max(minutes):g} CPU minutes." if minutes else ""),
            markdown_table(
                ["variant", "distance" if measured == "answers" else "length", *(f"seed {s}" for s in seeds), "mean"],
                rows,
            ),
        ]
    held = "\n".join(f"- {bar}" for bar in bars(lines))
    return "\n\n".join([*parts, *([held] if held else [])]) + "\n"


def draw(figure, problems: Sequence[str], lines: Sequence[dict]) -> None:
    """A line for the mean of each variant, a point for each seed."""
    for axes, problem in zip(figure.subplots(1, len(problems), squeeze=False)[0], problems, strict=True):
        of_problem = [line for line in lines if line["problem"] == problem]
        for number, variant in enumerate(dict.fromkeys(line["variant"] for line in of_problem)):
            runs = [list(line["accuracy"].values()) for line in of_problem if line["variant"] == variant]
            at, color = list(range(len(runs[0]))), f"C{number}"
            axes.plot(at, [statistics.mean(column) for column in zip(*runs, strict=True)], color=color, label=variant)
            for run in runs:
                axes.plot(at, run, "o", markersize=3, color=color)
        if of_problem:
            axes.axhline(of_problem[0]["chance"], color="gray", linestyle="--", linewidth=1, label="chance")
            names = [told.replace(", ", "\n") for told in of_problem[0]["accuracy"]]
            axes.set_xticks(range(len(names)), names, fontsize="small")
            axes.legend()
        axes.set(title=problem, ylabel="accuracy", ylim=(0, 1.03))
        axes.grid(alpha=0.3)


def report(lines: Sequence[dict], out: Path) -> None:
    """Writes the pages of what has been measured."""
    ordered = sorted(lines, key=lambda line: (VARIANTS.index(line["variant"]), line["seed"]))
    for name, (title, problems) in PAGES.items():
        mine = [line for line in ordered if line["problem"] in problems]
        shown = [problem for problem in problems if any(line["problem"] == problem for line in mine)]
        if shown:
            save_picture(out / f"{name}.png", lambda figure, p=shown, of=mine: draw(figure, p, of), (5 * len(shown), 4))
            (out / f"{name}.md").write_text(page(title, shown, mine, f"{name}.png"))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="over the config of each problem")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS, metavar="PROBLEM")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(3), metavar="N")
    parser.add_argument("--samples", type=int, default=256, help="sequences of each measurement (default: 256)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR", help="of lines and pages")
    parser.add_argument("--runs", type=Path, default=Path("runs/synthetic"), metavar="DIR", help="of run folders")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_intermixed_args()
    setup = describe_setup(1)
    points = (
        {"problem": problem, "variant": variant, "seed": seed}
        for seed, problem, variant in itertools.product(args.seeds, args.problems, args.variants)
    )
    lines = measure_missing(
        args.out / "synthetic.jsonl", () if args.report else points,
        lambda point: measure(point, args.runs, args.samples, args.settings), args.settings, setup,
    )  # fmt: skip
    report(lines, args.out)
    finish(args, setup, lines, list(bars(lines)))


if __name__ == "__main__":
    main()
