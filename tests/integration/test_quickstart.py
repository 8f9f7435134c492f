import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "quickstart.py"
SMALL = {
    "model.vocab_size": 512, "model.dim": 32, "model.layers": 1, "model.heads": 2, "model.memory.heads": 2, "model.window": 32,
    "data.seq_len": 64, "train.steps": 60, "train.micro_batch": 1, "train.global_batch": 1, "train.warmup_steps": 2,
    "train.eval_every": 20, "train.eval_batches": 1, "train.checkpoint_every": 20,
}  # fmt: skip


def quickstart(work: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "--work", str(work), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=work.parent)


@pytest.mark.slow
def test_every_step_runs_and_the_interrupted_run_is_whole(tmp_path):
    library, work = Path(sysconfig.get_path("stdlib")), tmp_path / "work"
    sources = [*library.glob("json/*.py"), *library.glob("e*/*.py")]
    (tmp_path / "my.txt").write_text("".join(path.read_text() for path in sources))  # one file, as a first corpus is
    options = ["--vocab-size", "512", "--prompt", "def __init__(self", "--text", "my.txt"]
    done = quickstart(work, *(f"{key}={value}" for key, value in SMALL.items()), *options)
    assert done.returncode == 0, done.stdout + done.stderr

    commands = [line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("$ titans-")]
    data, model = "titans-data", "titans-pretrain"
    assert commands == [
        [data, "tokenizer"], [data, "tokenize"], [data, "inspect"], [model, "train"], [model, "train"], [model, "export"],
        [model, "generate"], [model, "report"],
    ]  # fmt: skip
    assert "stopped by SIGINT" in done.stderr and "goes on from" in done.stdout
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 61))
    assert (work / "exported" / "config.json").is_file() and (work / "run" / "loss.png").is_file()
    assert done.stdout.count("def __init__(self") >= 4  # two commands, and what transformers and ours completed
    table = done.stdout[done.stdout.index("$ titans-pretrain report") :]
    for row in ("validation loss", "unigram entropy", "tokens/s", "peak memory", "loss.png"):
        assert row in table


def test_a_folder_of_others_is_left_alone(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.tex").write_text("years of work")
    done = quickstart(work)
    assert done.returncode == 1 and "choose another folder" in done.stderr
    assert [p.name for p in work.iterdir()] == ["thesis.tex"]


def test_a_command_that_fails_ends_it_with_one_line(tmp_path):
    done = quickstart(tmp_path / "work", "--text", str(tmp_path / "missing.py"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: titans-data ended with exit code 2" in done.stderr
