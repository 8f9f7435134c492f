"""`titans-pretrain eval --tasks` on a run and on its export: what it writes, how it goes on, what it refuses."""

import json
from pathlib import Path

import pytest

from titans_pretrain import cli
from titans_pretrain.checkpoint import find_checkpoint
from titans_pretrain.evaluation.model import LanguageModel
from titans_pretrain.hf.export import export_checkpoint

TINY = Path(__file__).parents[2] / "configs/tiny.yaml"
SMALL = ["perplexity.tokens=256", "perplexity.sequences=3", "perplexity.first_bucket=64"]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A run folder of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    overrides = ["train.steps=2", "train.eval_every=0", "model.dim=32"]
    assert cli.main(["train", str(TINY), f"data.path={data}", f"run.dir={folder}", *overrides]) == 0
    return folder


def test_run_and_export_give_the_same(run, data, tmp_path, capsys):
    assert cli.main(["eval", str(run), "--tasks", "perplexity", *SMALL]) == 0
    told = capsys.readouterr().out
    folder = run / "evaluation" / find_checkpoint(run).name
    assert (folder / "perplexity.md").read_text() in told
    exported = export_checkpoint(run, tmp_path / "exported")
    assert cli.main(["eval", str(exported), "--tasks", "perplexity", *SMALL, f"data.path={data}"]) == 0
    figures = [
        json.loads((f / "perplexity.json").read_text())["figures"] for f in (folder, tmp_path / "exported-evaluation")
    ]
    for ours, theirs in zip(*(f["buckets"] for f in figures), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)
    export_checkpoint(run, exported)  # nothing in it that is not the exporter's


def test_finished_items_are_not_run_again(run, tmp_path, monkeypatch, capsys):
    command = ["eval", str(run), "--tasks", "perplexity", "--out", str(tmp_path), "--at-once", "1", *SMALL]
    losses, calls = LanguageModel.losses, []

    def stops(self, tokens, state=None):
        calls.append(tokens.shape)
        if len(calls) > 7:  # five calls an item
            raise KeyboardInterrupt
        return losses(self, tokens, state)

    monkeypatch.setattr(LanguageModel, "losses", stops)
    assert cli.main(command) == 130
    before = (tmp_path / "perplexity.jsonl").read_text().splitlines()
    assert len(before) == 2
    monkeypatch.setattr(LanguageModel, "losses", losses)
    assert cli.main(command) == 0
    after = (tmp_path / "perplexity.jsonl").read_text().splitlines()
    assert after[:2] == before and len(after) == 4
    monkeypatch.setattr(LanguageModel, "losses", lambda *args: pytest.fail("an item was run again"))
    assert cli.main(command) == 0
    capsys.readouterr()
    assert cli.main([*command, "perplexity.sequences=2"]) == 2
    assert "has results of options.sequences=3, and this is options.sequences=2" in capsys.readouterr().err


def test_several_tasks_at_once(run, tmp_path, capsys):
    """A text of its own for the haystack; a table each."""
    (tmp_path / "hay.txt").write_text("Some text. And more of it.\n" * 9)
    settings = [
        "niah.tasks=[single_2]",
        "niah.lengths=[512]",
        "niah.samples=2",
        "niah.depths=2",
        "niah.answer_tokens=3",
    ]
    command = ["eval", str(run), "--tasks", "niah,perplexity", "--out", str(tmp_path / "out"), *SMALL, *settings]
    assert cli.main([*command, f"niah.text={tmp_path}/hay.txt"]) == 0
    told = capsys.readouterr().out
    assert told.index("Needle in a haystack") < told.index("Perplexity")
    assert (tmp_path / "out/niah-single_2.png").is_file()
    with open(tmp_path / "hay.txt", "a") as file:
        file.write("Another text.")
    assert cli.main([*command, f"niah.text={tmp_path}/hay.txt"]) == 2
    assert "niah.jsonl has results of text=" in capsys.readouterr().err


def test_what_is_wrong_is_told_in_a_line(run, capsys):
    for arguments, told in (
        (["--tasks", "nihilism"], "--tasks nihilism: there are perplexity"),
        (["perplexity.tokens=256", "--tasks", "perplexity", "--batches", "3"], "--batches is of the loss on a split"),
        (["--tasks", "perplexity", "perplexity.token=256"], "did you mean tokens?"),
        (["--tasks", "perplexity", "model.window=8"], "'model.window=8' has no effect on tasks"),
        (["--tasks", "perplexity", "--at-once", "0"], "--at-once must be 1 or more"),
        (["--tasks", "perplexity", "perplexity.text=nowhere.txt"], "nowhere.txt"),
    ):
        assert cli.main(["eval", str(run), *arguments]) == 2
        assert told in capsys.readouterr().err
    assert cli.main(["eval"]) == 2
    assert "eval needs a run" in capsys.readouterr().err


def test_a_run_cannot_execute_its_own_command(run, data, tmp_path, capsys):
    text = find_checkpoint(run) / "config.yaml"
    kept = text.read_text()
    text.write_text(kept.replace(f"path: {data}", f"path: 'pipe:touch {tmp_path}/ran; cat {data}/{{}}'"))
    try:
        assert cli.main(["eval", str(run), "--tasks", "perplexity"]) == 2
        assert "the run's own config reads its data by 'pipe:touch" in capsys.readouterr().err
        assert not (tmp_path / "ran").exists()
    finally:
        text.write_text(kept)


def test_tasks_are_listed_with_their_settings(capsys):
    assert cli.main(["eval", "--list"]) == 0
    assert "perplexity.tokens=16K" in capsys.readouterr().out
