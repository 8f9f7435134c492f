"""The compile guard: kernels compiled without a GPU use no more than benchmarks/results/kernel_resources.md says, all that a user may run
compiles, and once for every length."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from titans_pretrain.kernels.memory_scan.triton.launch import ROWS

ROOT = Path(__file__).parents[3]
COMMITTED = ROOT / "benchmarks" / "results" / "kernel_resources.md"
CHOSEN = ["1-64-1-64:tables", "1-64-1-64:walk", "1-64-1-64:state_back", "2-64-4-64:read", "2-64-4-64:hidden"]
OTHERS = [
    "1-64-1-32-fp32:walk",
    "2-64-2-32-fp16-gates:read",
    "2-64-2-32-fp16-gates:step",
    "2-64-2-32-fp16-gates:network",
]


def python(*arguments: str) -> str:
    """In a process of its own: this one interprets kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_spills_more_than_committed(tmp_path):
    points = compiled(tmp_path, "--only", *CHOSEN)
    assert len(points) >= len(CHOSEN)
    committed = spills()
    for p in points:
        allowed = committed[p["kernel"], p["row"], p["arch"]]
        assert p["spilled"] <= allowed, f"{p['kernel']} of {p['row']} spills {p['spilled']} bytes, committed: {allowed}"
        assert p["miscompiled"] == 0, f"{p['kernel']} of {p['row']} has a transposed result on the left of a product"


def compiled(folder: Path, *arguments: str) -> list[dict]:
    file = folder / "found.json"
    python("-m", "benchmarks.kernel_resources", *arguments, "--json", str(file))
    return json.loads(file.read_text())["points"]


@pytest.mark.slow
def test_other_shapes_and_dtypes_compile(tmp_path):
    points = compiled(tmp_path, "--others", "--only", *OTHERS)
    assert {p["arch"] for p in points} == {80, 90} and len(points) == 10
    assert not [p for p in points if "failed" in p or (p["arch"] == 90 and p["miscompiled"])]


@pytest.mark.slow
def test_all_that_a_user_may_run_compiles(tmp_path):
    points = compiled(tmp_path, "--others")
    assert {p["arch"] for p in points} == {80, 90, 100}
    assert not [p for p in points if "failed" in p or (p["arch"] == 90 and p["miscompiled"])]


@pytest.mark.slow
def test_no_program_is_of_one_length():
    """What differs from call to call is no constant of a program. A call that ends in a chunk has another program of state_back."""
    lines = python(str(Path(__file__).with_name("programs.py"))).splitlines()
    assert set(lines) <= {"step batch1", "step batch2", "network batch1", "network batch2", "other: state_back"}, lines
    assert "other: state_back" in lines


def spills() -> dict[tuple[str, str, int], int]:
    """kernel, row, architecture -> bytes, of the committed table."""
    return {(r["kernel"], r["row"], int(r["sm"])): int(r["spilled B"]) for r in table(COMMITTED)}


def table(file: Path) -> list[dict[str, str]]:
    """The rows of a file of results, by column."""
    lines = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in file.read_text().splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines if re.fullmatch(r"\d-.*", line[1])]


def test_a_row_knows_the_shared_memory_that_its_programs_take():
    """Of all versions, dtypes and architectures that were compiled."""
    most: dict[tuple[int, int], float] = {}
    for file in COMMITTED.parent.glob("kernel_resources*.md"):
        for r in table(file):
            depth, dim, *_ = map(int, r["row"].split("-")[:2])
            most[depth, dim] = max(most.get((depth, dim), 0), float(r["shared KiB"]))
    assert most == {shape: row.shared for shape, row in ROWS.items() if shape[1] >= 64}


def test_finds_what_is_miscompiled():
    bad, good = map(int, python(str(Path(__file__).with_name("transposed_result.py"))).split())
    assert bad > 0 and good == 0
