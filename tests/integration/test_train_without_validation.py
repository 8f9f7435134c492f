"""Data of which nothing is held out: training says so once and goes on; what needs the split still refuses."""

import pytest

from titans_pretrain import cli
from titans_pretrain.data_prep.tokenize import TokenizeOptions, tokenize
from titans_pretrain.data_prep.tokenizer import ByteTokenizer
from titans_pretrain.training.loggers import read_metrics

SMALL = [
    "model.dim=32",
    "model.layers=1",
    "data.seq_len=64",
    "train.micro_batch=1",
    "train.global_batch=1",
    "train.steps=2",
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a line of text\n\n" * 40)
    return path


def test_it_is_one_warning(text, tmp_path, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    tokenize([str(text)], ByteTokenizer(), data, TokenizeOptions(0.0))
    assert cli.main(["train", "tiny", *SMALL, f"data.path={data}", f"run.dir={run}"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "validation" in line]
    assert len(told) == 1 and told[0].startswith("warning: ") and f"{data} has no validation documents" in told[0]
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2]
    assert cli.main(["report", str(run)]) == 0
    assert cli.main(["eval", str(run)]) == 2
    assert "has no validation documents" in capsys.readouterr().err


def test_no_training_documents_stay_an_error(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    tokenize([str(tmp_path / "empty.jsonl")], ByteTokenizer(), tmp_path / "data", TokenizeOptions())
    assert cli.main(["train", "tiny", *SMALL, f"data.path={tmp_path}/data", f"run.dir={tmp_path}/run"]) == 2
    error = capsys.readouterr().err
    assert "has no train documents; tokenize more text" in error and error.count("\n") == 1
