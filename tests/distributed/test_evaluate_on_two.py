"""Two processes share the items of a task; what comes out is what one process says."""

import json
from pathlib import Path

import pytest

from titans_pretrain import cli

SMALL = ["perplexity.tokens=64", "perplexity.sequences=5", "perplexity.first_bucket=16", "--at-once", "2"]


def evaluate(run: str, out: str) -> tuple[int, int]:
    """The exit code, and how many tokens this process has read."""
    from titans_pretrain.evaluation import run as runner

    models, opened = [], runner.open_model

    def noted(*arguments):
        models.append(opened(*arguments))
        return models[-1]

    runner.open_model = noted
    try:
        code = cli.main(["eval", run, "--tasks", "perplexity", "--out", out, *SMALL])
    finally:
        runner.open_model = opened
    return code, models[0].tokens_read


@pytest.mark.slow
def test_items_are_shared(ranks, data, tmp_path):
    run = tmp_path / "run"
    options = [
        "train.steps=1",
        "train.eval_every=0",
        "train.global_batch=2",
        "model.dim=32",
        "data.seq_len=64",
        "model.window=16",
    ]
    tiny = Path(__file__).parents[2] / "configs/tiny.yaml"
    assert cli.main(["train", str(tiny), f"data.path={data}", f"run.dir={run}", *options]) == 0
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    answers = ranks(2).run(evaluate, str(run), str(two))
    assert [code for code, _ in answers] == [0, 0]
    code, all_tokens = evaluate(str(run), str(one))
    assert code == 0
    read = [tokens for _, tokens in answers]
    assert sum(read) == all_tokens and min(read) >= all_tokens // 5
    ours, theirs = (json.loads((folder / "perplexity.json").read_text()) for folder in (two, one))
    assert ours["identity"] == theirs["identity"]
    for a, b in zip(ours["figures"]["buckets"], theirs["figures"]["buckets"], strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    # and what two have done, one does not do again
    assert evaluate(str(run), str(two)) == (0, 0)
