"""Benchmarks that train small models for a task: what they make, and that points which have a line are not trained again."""

import csv
import json
import math
import re
import sys

import numpy as np
import pytest

from benchmarks import common, forecasting, motifs

TINY = ["train.steps=2", "train.batch=4", "train.eval_every=1", "model.dim=16", "model.layers=1", "model.persistent_tokens=2"]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(benchmark, *arguments): the lines of its file afterwards."""

    def run(benchmark, *arguments: str) -> list[dict]:
        name = benchmark.__name__.split(".")[-1]
        folders = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", [name, *arguments, *folders])
        benchmark.main()
        return [json.loads(line) for line in (tmp_path / f"out/{name}.jsonl").read_text().splitlines()]

    return run


def test_only_what_has_no_line_is_measured(tmp_path):
    file, points = tmp_path / "deep/lines.jsonl", [{"task": "a", "seed": 0}, {"task": "b", "seed": 0}]
    measured = []

    def measure(point: dict) -> dict:
        measured.append(point)
        return {"found": len(measured)}

    common.measure_missing(file, points[:1], measure, ["train.lr=1"], {"date": "today"})
    lines = common.measure_missing(file, [*points, points[1]], measure, ["train.lr=1"], {"date": "later"})
    assert measured == points and common.measure_missing(file, (), measure, [], {}) == lines
    with pytest.raises(
        SystemExit, match=r"lines\.jsonl has results with other settings \(train\.lr=1\): give another --out"
    ):
        common.measure_missing(file, points, measure, [], {})
    assert [(line["task"], line["found"], line["setup"]["date"]) for line in lines] == [("a", 1, "today"), ("b", 2, "later")]  # fmt: skip
    assert common.describe_setups([*lines, *lines]) == "date: today\n\ndate: later"
    loaded = [{"setup": {"date": "today", "load": f"{load} at the start"}} for load in (10.5, 2.0, 3.1)]
    assert common.describe_setups(loaded) == "date: today\nload: 2.0 to 10.5 at the start"
    assert common.describe_setups(loaded[:1] * 2) == "date: today\nload: 10.5 at the start"
    assert common.seed_cells({2: 1.0, 0: 2.0}, [0, 1, 2]) == ["2.0", "", "1.0", "1.5"]


def test_the_boxes_of_a_motif():
    """Written anew by a loop: where a class has both boxes, in its order, but for a tenth of their bases."""
    seen = {}
    for task in ("motif", "order"):
        for sequence, label in motifs.planted_split(task, 400, seed=0, test=False):
            assert len(sequence) == 80 and set(sequence) <= set("ACGT")
            for name, (first, second) in {"right": ("TTGACA", "TATAAT"), "wrong": ("TATAAT", "TTGACA")}.items():
                best = 0
                for at in range(80 - 27 + 1):
                    for spacer in range(15, 20):
                        there = sequence[at : at + 6] + sequence[at + 6 + spacer : at + 12 + spacer]
                        best = max(best, sum(a == b for a, b in zip(there, first + second)))
                seen.setdefault((task, label, name), []).append(best)
    mean = {key: sum(values) / len(values) for key, values in seen.items()}
    kept = 12 * (1 - 0.1 * 0.75)  # of 12 bases; chance finds up to 8 or 9
    for key in (("motif", 1, "right"), ("order", 1, "right"), ("order", 0, "wrong")):
        assert kept - 0.2 < mean[key] < 11.6, key
    for key in (("motif", 0, "right"), ("motif", 0, "wrong"), ("order", 1, "wrong"), ("order", 0, "right")):
        assert mean[key] < 9, key
    again, other = (motifs.planted_split("order", 400, seed=0, test=test) for test in (False, True))
    assert again == motifs.planted_split("order", 400, 0, False) and not {s for s, _ in again} & {s for s, _ in other}


def test_every_promoter_is_tested_once_by_a_model_that_has_not_seen_it():
    pairs = [(f"{i}", i % 2) for i in range(106)]
    tested = []
    for train, test in motifs.folds(pairs, seed=3):
        assert not set(train) & set(test) and sorted(train + test) == sorted(pairs)
        assert abs(sum(label for _, label in test) - len(test) / 2) <= 1
        tested += test
    assert sorted(tested) == sorted(pairs)
    assert [test for _, test in motifs.folds(pairs, 3)] != [test for _, test in motifs.folds(pairs, 4)]


@pytest.mark.slow
def test_motifs_are_trained_once_and_shown(run, monkeypatch, tmp_path):
    draw = np.random.default_rng(0)
    monkeypatch.setattr(motifs, "TRAINED_ON", 60)
    monkeypatch.setattr(motifs, "TESTED_ON", 20)
    monkeypatch.setattr(motifs, "FOLDS", 2)
    pairs = [("".join(draw.choice(list("ACGT"), 57)), i % 2) for i in range(40)]
    monkeypatch.setattr(motifs, "read_promoters", lambda path: pairs)
    with pytest.raises(SystemExit, match="--promoters FILE"):
        run(motifs, *TINY, "--tasks", "promoters")
    lines = run(motifs, *TINY, "--promoters", "promotergene.rda", "--seeds", "0")
    assert [(line["task"], line["tested"]) for line in lines] == [("motif", 20), ("order", 20), ("promoters", 40)]
    assert all(0 <= line["accuracy"][name] <= 1 for line in lines for name in ("lmm", "k-mers"))
    assert run(motifs, *TINY, "--tasks", "motif", "order", "--seeds", "0") == lines == run(motifs, "--report")
    text = (tmp_path / "out/motifs.md").read_text()
    assert re.search(rf"\| promoters \| +lmm \| +{100 * lines[2]['accuracy']['lmm']:.1f} \|", text)
    assert (tmp_path / "out/motifs.png").stat().st_size > 1000


@pytest.mark.slow
def test_forecasts_are_trained_once_and_shown(run, tmp_path):
    path = tmp_path / "waves.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("date", "a"), *((i, math.sin(i / 3)) for i in range(400))])
    own = [*TINY, "series.lookback=24", "series.patch=6", "series.stride=3"]
    lines = run(forecasting, str(path), *own, "--losses", "mse", "--horizons", "6", "9", "--seeds", "0", "1")
    assert [(line["horizon"], line["seed"]) for line in lines] == [(6, 0), (9, 0), (6, 1), (9, 1)]
    assert (
        lines[0]["test"]["lmm"] != lines[2]["test"]["lmm"] and lines[0]["test"]["linear"] == lines[2]["test"]["linear"]
    )
    assert run(forecasting, str(path), "--report") == lines
    text = (tmp_path / "out/forecasting.md").read_text()
    mean = (lines[0]["test"]["lmm"]["mse"] + lines[2]["test"]["lmm"]["mse"]) / 2
    assert "# Forecasting of waves" in text and f"| {mean:.4f} |" in text and "## Horizon 9" in text
    for name in ("forecasting", "forecasts-6", "forecasts-9"):
        assert (tmp_path / f"out/{name}.png").stat().st_size > 1000
