import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import common, memory_scan_cpu, synthetic, train_step_cpu
from titans_pretrain.config import ModelConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("variant", [pytest.param("mac", marks=pytest.mark.slow), "transformer"])
def test_a_step_is_split_into_its_parts(variant):
    tokens = 512
    point = train_step_cpu.measure(variant, tokens)
    c = ModelConfig()
    flops, seconds = point["flops"], point["seconds"]
    assert flops["mlp"] == 3 * 2 * tokens * c.layers * 3 * c.dim * c.ffn_dim  # forward, two products backward
    assert flops["loss"] == 3 * 2 * tokens * c.dim * c.vocab_size
    assert flops["optimizer"] == flops["data"] == flops["rest"] == 0
    projections = 3 * 2 * tokens * c.layers * c.dim**2
    assert flops["attention"] > 4 * projections and seconds["attention"] > 0
    if variant == "mac":
        assert (
            flops["memory"] > 6 * projections and seconds["memory"] > 0
        )  # retrieval and five projections, then the scan
    else:
        assert flops["memory"] == seconds["memory"] == 0
    assert all(seconds[part] > 0 for part in ("mlp", "loss", "optimizer", "data", "rest"))


@pytest.mark.parametrize("side", [memory_scan_cpu.OURS, memory_scan_cpu.PEER])
@pytest.mark.slow
def test_both_sides_of_the_scan_run_at_the_same_shape(side):
    if side == memory_scan_cpu.PEER:
        pytest.importorskip("titans_pytorch")
    point = common.run_point("benchmarks.memory_scan_cpu", {"side": side, "chunk": 16, "tokens": 128})
    assert point["tokens_per_cpu_second"] > 0 and point["peak_gib"] > 0


@pytest.mark.slow
def test_the_study_of_the_inner_step_goes_on_where_it_stopped(tmp_path):
    """Points that the file has are not measured again; the report needs none measured."""
    results = tmp_path / "study.jsonl"
    command = [sys.executable, "-m", "benchmarks.inner_step", "--results", str(results)]
    for _ in range(2):
        subprocess.run([*command, "--quick", "--only", "gradient"], cwd=ROOT, check=True, capture_output=True)
    points = [json.loads(line) for line in results.read_text().splitlines()]
    assert [p["seed"] for p in points] == [0, 1] and all(p["norms"]["equal"] > 0 for p in points)
    report = subprocess.run([*command, "--report"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "| transformer |" in report and len(results.read_text().splitlines()) == 2


@pytest.mark.slow
def test_what_generation_holds_is_measured():
    points = [common.run_point("benchmarks.generation", {"variant": "mag", "tokens": n}) for n in (256, 2048)]
    assert points[0]["state"] == points[1]["state"] > 0
    assert all(p["read"] > 0 and p["written"] > 0 and p["peak"] >= p["before"] for p in points)


def test_small_models_are_trained_once_and_shown(tmp_path, monkeypatch, capsys):
    """Points that have a line are not trained again; the pages leave empty what was not measured."""
    command = ["synthetic", "--samples", "2", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    tiny = ["train.steps=2", "train.micro_batch=2", "train.global_batch=2", "model.dim=16", "model.ffn_dim=16"]

    def run(*arguments: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        synthetic.main()
        return [json.loads(line) for line in (tmp_path / "out/synthetic.jsonl").read_text().splitlines()]

    first = run(*tiny, "--problems", "needle", "s5", "--variants", "lmm", "--seeds", "1")
    assert [(p["problem"], p["variant"], p["seed"], p["steps"]) for p in first] == [
        ("needle", "lmm", 1, 2),
        ("s5", "lmm", 1, 2),
    ]
    assert list(first[0]["accuracy"]) == [f"{n} windows, {8 * n} tokens" for n in synthetic.WINDOWS]
    assert list(first[1]["accuracy"]) == [f"{16 * n} tokens" for n in synthetic.LENGTHS]
    (tmp_path / "runs/needle-lmm-1/config.yaml").unlink()  # nobody looks there again
    both = run(*tiny, "--problems", "needle", "--variants", "lmm", "transformer", "--seeds", "1")
    assert both[:2] == first and [p["variant"] for p in both[2:]] == ["transformer"]
    told = "8 windows, 64 tokens"
    first[0] |= {"seed": 0, "accuracy": first[0]["accuracy"] | {told: 1.0}}
    with (tmp_path / "out/synthetic.jsonl").open("a") as f:
        f.write(json.dumps(first[0]) + "\n")
    assert len(run("--report")) == 4
    rows = [line for line in (tmp_path / "out/retrieval.md").read_text().splitlines() if f" {told} |" in line]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    lmm, transformer = (100 * both[i]["accuracy"][told] for i in (0, 2))
    assert cells == [
        ["lmm", told, "100.0", f"{lmm:.1f}", f"{50 + lmm / 2:.1f}"],
        ["transformer", told, "", f"{transformer:.1f}", f"{transformer:.1f}"],
    ]
    assert (tmp_path / "out/state-tracking.md").exists() and (tmp_path / "out/retrieval.png").stat().st_size > 1000
    assert "needle, lmm, distance 8 windows, 64 tokens" in capsys.readouterr().out


def touch(mebibytes: int) -> None:
    with mmap.mmap(-1, mebibytes << 20) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1


def test_the_peak_is_that_of_the_measured_stretch():
    touch(64)
    common.reset_peak()
    before = common.resident_bytes()
    touch(32)
    assert 31 << 20 < common.resident_bytes(peak=True) - before < 40 << 20


def test_strict_fails_when_a_bar_is_not_held(tmp_path, capsys):
    bars = [common.Bar("speed", 4.0, 5.0, "times"), common.Bar("memory", 0.5, 1.0, "GiB", at_least=False)]
    args = common.argument_parser("").parse_args(["--json", str(tmp_path / "out.json")])
    common.finish(args, {}, [], bars)
    assert capsys.readouterr().out.split("\n")[1:3] == [
        "speed: 4 times, at least 5: NOT HELD",
        "memory: 0.5 GiB, at most 1: held",
    ]
    assert '"held": false' in (tmp_path / "out.json").read_text()
    args.strict = True
    with pytest.raises(SystemExit, match="1"):
        common.finish(args, {}, [], bars)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments", "bars"),
    [
        ("parallel", ["--only", "payload", "tensor", "zero"], 10),
        ("long_context", ["--only", "needle"], 2),
    ],
)
def test_the_benchmarks_of_several_processes_hold_what_is_exact(tmp_path, module, arguments, bars):
    """Traffic, formulas and gradients, which no load of the machine changes."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--strict", "--json", str(figures), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [bar["held"] for bar in json.loads(figures.read_text())["bars"]] == [True] * bars


def test_a_timeline_knows_what_is_idle(tmp_path):
    from titans_pretrain.parallel.timeline import idle_share, write_chrome_trace

    ranks = [
        [("forward", "a", 0.0, 2.0), ("wait", "b", 2.0, 3.0), ("backward", "a", 3.0, 4.0)],
        [("forward", "a", 1.0, 4.0)],
    ]
    assert idle_share(ranks) == pytest.approx(2 / 8)
    write_chrome_trace(tmp_path / "trace.json", ranks)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert [(e["tid"], e["ts"], e["dur"]) for e in spans] == [(0, 0, 2e6), (0, 2e6, 1e6), (0, 3e6, 1e6), (1, 1e6, 3e6)]
