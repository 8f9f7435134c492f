"""Labelled DNA: motifs that were planted, and the promoters of E. coli; a small memory from scratch beside k-mers, three seeds.

    python -m benchmarks.motifs                                       # the planted ones: ten minutes on one core
    apt-get download r-cran-kernlab && dpkg -x r-cran-kernlab_*.deb x && pip install rdata
    python -m benchmarks.motifs --promoters x/usr/lib/R/site-library/kernlab/data/promotergene.rda
    python -m benchmarks.motifs --report                              # the page anew; nothing is trained

motif      80 random bases, or such with a promoter's two boxes, TTGACA and 15 to 19 bases later TATAAT, each base of a box drawn anew
           with a probability of a tenth
order      the same two boxes in all sequences; the class is which one comes first, of which short k-mers know nothing
promoters  53 promoters of E. coli and 53 other pieces, 57 bases each (Harley and Reynolds 1987; Towell et al. 1990), in five folds: each
           sequence is tested by a model that has not seen it

Each point (task, seed) leaves a line in OUT/motifs.jsonl; those that are there are not done again. OUT/motifs.md has the table.
"""

import csv
import itertools
import json
import shutil
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

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
from titans_pretrain.genomics.config import ClassifyConfig
from titans_pretrain.genomics.run import classify

BASES, BOXES = tuple("ACGT"), ("TTGACA", "TATAAT")
LENGTH, SPACERS, DRAWN_ANEW = 80, range(15, 20), 0.1
TRAINED_ON, TESTED_ON, FOLDS = 4000, 1000, 5
TASKS = {"motif": ("absent", "present"), "order": ("TATAAT first", "TTGACA first"), "promoters": ("other", "promoter")}
LEAST = 80  # percent


def planted(task: str, label: int, draw: np.random.Generator) -> str:
    bases = draw.choice(BASES, LENGTH)
    if task == "order" or label:
        first, second = BOXES if label else BOXES[::-1]
        spacer = int(draw.choice(SPACERS))
        at = int(draw.integers(LENGTH - len(first) - spacer - len(second) + 1))
        for box, start in ((first, at), (second, at + len(first) + spacer)):
            anew = draw.random(len(box)) < DRAWN_ANEW
            bases[start : start + len(box)] = np.where(anew, draw.choice(BASES, len(box)), tuple(box))
    return "".join(bases)


def planted_split(task: str, count: int, seed: int, test: bool) -> list[tuple[str, int]]:
    draw = np.random.default_rng([seed, list(TASKS).index(task), test])
    return [(planted(task, i % 2, draw), i % 2) for i in range(count)]


def read_promoters(path: Path) -> list[tuple[str, int]]:
    """Of an R data file whose table `promotergene` has a class, + or -, and a base in each other column."""
    try:
        import rdata
    except ImportError:
        raise SystemExit("an .rda file is read with rdata: pip install rdata") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file says no encoding
        table = rdata.read_rda(path)["promotergene"]
    return [("".join(map(str, row[1:])).upper(), int(row[0] == "+")) for row in table.itertuples(index=False)]


def folds(pairs: Sequence[tuple[str, int]], seed: int) -> Iterator[tuple[list, list]]:
    """(training, test) for each fold; every sequence is in one test, the classes in equal shares."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    order = sorted(order, key=lambda i: pairs[i][1])  # stable: shuffled within a class
    for fold in range(FOLDS):
        tested = set(order[fold::FOLDS])
        yield [pairs[i] for i in order if i not in tested], [pairs[i] for i in order if i in tested]


def write_split(path: Path, task: str, pairs: Iterable[tuple[str, int]]) -> None:
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerows([("sequence", "label"), *((sequence, TASKS[task][label]) for sequence, label in pairs)])


def measure(point: dict, promoters: Path | None, runs: Path, settings: Sequence[str]) -> dict:
    """Raises SystemExit where a signal stopped a training."""
    task, seed = point["task"], point["seed"]
    if task == "promoters":
        if promoters is None:
            raise SystemExit("the promoters need --promoters FILE; --help says where it is to be had")
        splits: Iterable = folds(read_promoters(promoters), seed)
    else:
        splits = [(planted_split(task, TRAINED_ON, seed, False), planted_split(task, TESTED_ON, seed, True))]
    found = []
    for number, (train, test) in enumerate(splits):
        folder = runs / f"{task}-{seed}-{number}"
        shutil.rmtree(folder, ignore_errors=True)  # of a training that was stopped: none goes on
        folder.mkdir(parents=True)
        write_split(folder / "train.csv", task, train)
        write_split(folder / "test.csv", task, test)
        own = [f"data.path={folder}", f"run.dir={folder}/run", f"train.seed={seed}", *settings]
        name = "genomics/promoters" if task == "promoters" else "genomics/motif"
        if code := classify(load_as(ClassifyConfig, name, own), lambda line: None):
            raise SystemExit(code)
        found.append(json.loads((folder / "run/metrics.json").read_text()))
    tested = sum(run["test_sequences"] for run in found)
    accuracy = {
        "lmm": sum(run["test_accuracy"] * run["test_sequences"] for run in found) / tested,
        "k-mers": sum(run["kmers"]["accuracy"] * run["test_sequences"] for run in found) / tested,
    }
    return {
        "accuracy": accuracy,
        "tested": tested,
        "parameters": found[0]["trained_parameters"],
        "cpu_seconds": round(sum(run["cpu_seconds"] for run in found), 1),
    }


def by_task(lines: Sequence[dict]) -> dict[str, dict[str, dict[int, float]]]:
    """task -> classifier -> seed -> percent"""
    return {
        task: {
            name: {line["seed"]: 100 * line["accuracy"][name] for line in lines if line["task"] == task}
            for name in ("lmm", "k-mers")
        }
        for task in TASKS
        if any(line["task"] == task for line in lines)
    }


def bars(lines: Sequence[dict]) -> Iterator[Bar]:
    for task, found in by_task(lines).items():
        mean, kmers = (statistics.mean(found[name].values()) for name in ("lmm", "k-mers"))
        yield Bar(f"{task}: test accuracy, mean over seeds", mean, LEAST, "%")
        yield Bar(f"{task}: over k-mers", mean - kmers, 0, "points")


def page(lines: Sequence[dict]) -> str:
    seeds = sorted({line["seed"] for line in lines})
    rows = [
        [task, name, *seed_cells(by_seed, seeds)]
        for task, found in by_task(lines).items()
        for name, by_seed in found.items()
    ]
    tested = ", ".join(f"{line['tested']:,} of {line['task']}" for line in lines if line["seed"] == seeds[0])
    return (
        "\n\n".join(
            [
                "# Motifs and promoters",
                "    python -m benchmarks.motifs --promoters promotergene.rda",
                describe_setups(lines),
                "![accuracy](motifs.png)",
                f"Test accuracy, %; by chance 50. Test sequences of a seed: {tested}. `lmm` has {lines[0]['parameters']:,} parameters and "
                "starts from scratch; k-mers are the logistic regression of docs/genomics.md. What the tasks are is said at the top of "
                "benchmarks/motifs.py; a seed draws the sequences (promoters: the folds), the initial weights and the order of training.",
                markdown_table(["task", "classifier", *(f"seed {s}" for s in seeds), "mean"], rows),
                "\n".join(f"- {bar}" for bar in bars(lines)),
            ]
        )
        + "\n"
    )


def draw(figure, lines: Sequence[dict]) -> None:
    """A bar for the mean, a point for each seed."""
    axes, tasks = figure.subplots(), by_task(lines)
    for number, name in enumerate(("lmm", "k-mers")):
        for at, found in enumerate(tasks.values()):
            values = list(found[name].values())
            x = at + 0.4 * number - 0.2
            axes.bar(x, statistics.mean(values), 0.36, color=f"C{number}", alpha=0.5, label=None if at else name)
            axes.plot([x] * len(values), values, "o", color=f"C{number}", markersize=4)
    axes.axhline(50, color="gray", linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(range(len(tasks)), list(tasks))
    axes.set(ylabel="test accuracy, %", ylim=(40, 101))
    axes.legend()


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="over the config of each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help="all that can be had by default")
    parser.add_argument("--promoters", type=Path, metavar="FILE", help="promotergene.rda of R's kernlab")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(3), metavar="N")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR", help="of lines and page")
    parser.add_argument("--runs", type=Path, default=Path("runs/motifs"), metavar="DIR", help="of data and run folders")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_intermixed_args()
    setup = describe_setup(1)
    tasks = args.tasks or [task for task in TASKS if task != "promoters" or args.promoters]
    points = ({"task": task, "seed": seed} for seed, task in itertools.product(args.seeds, tasks))
    lines = measure_missing(
        args.out / "motifs.jsonl", () if args.report else points,
        lambda point: measure(point, args.promoters, args.runs, args.settings), args.settings, setup,
    )  # fmt: skip
    save_picture(args.out / "motifs.png", lambda figure: draw(figure, lines), (6, 4))
    (args.out / "motifs.md").write_text(page(lines))
    finish(args, setup, lines, list(bars(lines)))


if __name__ == "__main__":
    main()
