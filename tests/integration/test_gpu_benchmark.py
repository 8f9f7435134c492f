"""benchmarks.gpu without a GPU: every line of it on tiny sizes, on a machine that lacks what ours has."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as entry
from benchmarks.gpu import harness, proof, report, step
from titans_pretrain.config import load_config

ROOT = Path(__file__).parents[2]
ABSENT = (
    "omegaconf pydantic pyarrow deepspeed megatron transformers safetensors yaml fsspec sentencepiece tokenizers zstandard matplotlib tqdm "
    "titans_pytorch fla flash_attn webdataset"
)


def run(*arguments: str, environment: dict | None = None, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=check, env=os.environ | (environment or {})
    )


def session(tmp_path, until: float = float("inf")) -> harness.Session:
    return harness.Session(tmp_path / "points.jsonl", torch.device("cpu"), until, quick=True)


def figures_of(folder: Path) -> dict:
    (file,) = folder.glob("*-gpu-cpu.json")
    return json.loads(file.read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is none")
def test_without_a_gpu_it_says_what_it_needs(tmp_path):
    done = run("--out", str(tmp_path), check=False)
    assert done.returncode == 2 and "no CUDA device is seen" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["170m", "760m", "1.3b"])
def test_the_sizes_are_the_shipped_ones(size):
    shipped = load_config(f"configs/{size}-mag.yaml").model
    assert step.model_config(size, "mag") == shipped
    assert step.model_config(size, "lmm") == replace(shipped, variant="lmm")
    full = load_config(f"configs/{size}-mag.yaml", ["model.variant=transformer", "model.window=null"])
    full = replace(full.model, persistent_tokens=0, rotary_percent=1.0)
    assert step.model_config(size, "transformer, full") == full


def test_the_clock_and_failures_are_told(tmp_path):
    s = session(tmp_path)

    def failing(test):
        raise RuntimeError("no\nluck")

    assert s.point(lambda test: {"x": 1}, test="a")["x"] == 1
    s.point(failing, test="b")
    s.until = 0
    s.point(lambda test: {"x": 1}, test="c")
    found = [json.loads(line) for line in s.file.read_text().splitlines()]
    assert [(p["test"], p.get("x"), p.get("failed"), p.get("skipped")) for p in found] == [
        ("a", 1, None, None), ("b", None, "RuntimeError: no luck", None), ("c", None, None, "the clock is spent"),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_witness_is_exact_and_finds_what_is_off(dtype, monkeypatch):
    assert proof.witness(torch.device("cpu"), dtype)["exact"]
    scan = proof.memory_scan

    def off(*args, backend, **kwargs):
        y, state = scan(*args, backend=backend, **kwargs)
        return (y if backend == "reference" else y * (1 + 2**-20)), state

    monkeypatch.setattr(proof, "memory_scan", off)
    found = proof.witness(torch.device("cpu"), dtype)
    assert not found["exact"] and "y" in found["wrong"]


def test_bars_are_held_not_held_or_not_measured():
    scan = {"part": "scan", "test": "scan", "depth": 2, "expansion": 4, "chunk": 64}
    short = scan | {"batch": 8, "tokens": 4096}
    points = [
        short | {"side": "ours", "both_tokens_per_second": 1e6, "both_of_floor": 0.4},
        short | {"side": "chunked, eager", "both_tokens_per_second": 2e5},
        scan | {"batch": 1, "tokens": 32768, "side": "ours", "skipped": "out of memory"},
        {"part": "proof", "test": "probe", "ptxas": "a", "loaded": True, "digest": "1"},
        {"part": "proof", "test": "probe", "ptxas": "b", "failed": "no"},
        {"part": "proof", "test": "probe", "ptxas": "c", "loaded": True, "digest": "2"},
        {"part": "proof", "test": "witness", "dtype": "float32", "exact": False},
    ]
    bars, missing = report.bars_of(points, quick=False)
    held = {bar.name: (bar.measured, bar.held) for bar in bars}
    assert held == {
        "scan, chunk 64: of the roofline's floor": (0.4, True),
        "scan, chunk 64: over chunked in eager torch": (5.0, False),
        "assemblers whose code the driver loads": (2, False),
        "different bits among assemblers": (2, False),
        "witness in whole numbers, float32": (False, False),
    }
    assert "scan, chunk 64: 1 x 32K over 8 x 4K, per token" in missing and "first step, cold" in missing
    text = report.markdown(points, {"card": "H100", "date": "today", "command": "c"}, quick=False)
    assert "NOT HELD" in text and "not measured" in text and "out of memory" in text


def test_what_is_missing_is_installed_from_files(tmp_path, monkeypatch):
    """A stand-in for a package of a name that is not installed here, and one that is not among the files."""
    about = "stand_in_of_a_peer-1.0.dist-info"
    files = {
        "stand_in/__init__.py": "here = True\n",
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: stand-in-of-a-peer\nVersion: 1.0\nRequires-Dist: not-among-the-files\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{about}/RECORD"))
    with zipfile.ZipFile(tmp_path / "stand_in_of_a_peer-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    monkeypatch.setattr(entry, "PACKAGES", ("torch", "stand-in-of-a-peer", "not-among-the-files"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert entry.install(tmp_path, tmp_path / "site", environment) == "stand-in-of-a-peer (alone)"
    subprocess.run(
        [sys.executable, "-c", "import stand_in, titans_pretrain; assert stand_in.here"], env=environment, check=True
    )


def test_a_part_whose_time_is_over_is_named(tmp_path):
    run("--quick", "--device", "cpu", "--only", "scan", "--minutes", "0.1", "--out", str(tmp_path))
    found = figures_of(tmp_path)
    assert found["points"] == [{"part": "scan", "skipped": "the clock is spent"}] and not found["bars"]


@pytest.mark.slow
def test_every_line_of_it_on_a_bare_machine(tmp_path):
    """Without the packages of ABSENT: training through the command is skipped by name, and nothing fails."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT.split()!r}))\n")
    run(
        "--quick", "--device", "cpu", "--minutes", "30", "--out", str(tmp_path), environment={"PYTHONPATH": str(hidden)}
    )
    found = figures_of(tmp_path)
    assert not [p for p in found["points"] if "failed" in p]
    assert {p["part"] for p in found["points"]} == {"proof", "scan", "step", "train"}
    skipped = {p.get("side"): p["skipped"] for p in found["points"] if "skipped" in p and p["part"] == "train"}
    assert set(skipped) == {"one process", "ZeRO 1", "ring, cp 2"} and "omegaconf" in skipped["one process"]
    bars = {bar["name"]: bar["held"] for bar in found["bars"]}
    for name in (
        "witness in whole numbers, bfloat16",
        "rows within the tolerances, float32",
        "results of 20 runs, depth 2",
    ):
        assert bars[name]


@pytest.mark.slow
def test_training_through_the_command(tmp_path):
    pytest.importorskip("megatron")
    run("--quick", "--device", "cpu", "--only", "train", "--minutes", "30", "--out", str(tmp_path))
    points = figures_of(tmp_path)["points"]
    assert [(p["side"], p["held"]) for p in points] == [("one process", None), ("ZeRO 1", True), ("ring, cp 2", True)]
