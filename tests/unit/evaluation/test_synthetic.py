"""Sequences against the definitions of their problems, written out; and accuracies of models that are known."""

import itertools

import numpy as np
import pytest
import torch

from titans_pretrain import cli
from titans_pretrain.evaluation.synthetic import NO_LABEL, Options, Synthetic, make_row
from titans_pretrain.evaluation.train_synthetic import SyntheticReader, train_synthetic


def test_mqar_asks_for_each_key_once():
    options, gaps = Options(vocab=64, lengths=[32], pairs=6), []
    for i in range(40):
        tokens, labels = make_row(options, 32, i)
        known = dict(zip(tokens[0:12:2].tolist(), tokens[1:12:2].tolist(), strict=True))
        assert len(known) == 6 and max(known) < 32 <= min(known.values())
        asked = np.flatnonzero(labels != NO_LABEL)
        assert {int(tokens[at]): int(labels[at]) for at in asked} == known and len(asked) == 6
        assert asked.min() >= 12 and set((asked % 2).tolist()) == {0}
        assert tokens[12:][labels[12:] == NO_LABEL].min() >= 32  # nothing else looks like a key
        gaps += ((asked - 12) // 2).tolist()
    assert gaps.count(0) > 2 * gaps.count(9) > 0


@pytest.mark.parametrize("problem", ["mqar", "needle"])
@pytest.mark.parametrize(("pairs", "repeats", "gap"), [(1, 1, 0), (3, 2, 0), (2, 1, 17), (4, 3, 24)])
def test_questions_are_answered_by_reading_on(problem, pairs, repeats, gap):
    """A reader that notes the token after each new key knows every answer, and has read it `gap` tokens before at least."""
    options = Options(problem, vocab=64, lengths=[56], pairs=pairs, repeats=repeats, gap=gap)
    nearest, places = 56, set()
    for i in range(300):
        tokens, labels = make_row(options, 56, i)
        known, asked = {}, []
        for at, (token, label) in enumerate(zip(tokens.tolist(), labels.tolist(), strict=True)):
            if label != NO_LABEL:
                value_at, value = known[token]
                assert label == value
                nearest = min(nearest, at - value_at - 1)
                asked.append(token)
            elif token < 32:
                known[token] = (at + 1, int(tokens[at + 1]))
                places.add(at)
        assert len(known) == pairs and sorted(asked) == sorted([*known] * repeats)
    assert gap <= nearest <= gap + 1  # tokens between a value and its question; all of these gaps occur
    if problem == "needle":
        end = 56 - 2 * pairs * repeats - gap
        assert places == set(range(0, end - 1, 2))
    else:
        assert places == set(range(0, 2 * pairs, 2))


def test_parity_and_products():
    tokens, labels = make_row(Options(problem="parity"), 50, 3)
    assert labels.tolist() == [sum(tokens[: i + 1]) % 2 for i in range(50)]
    tokens, labels = make_row(Options(problem="s5"), 50, 3)
    group, things = list(itertools.permutations(range(5))), (0, 1, 2, 3, 4)
    for token, label in zip(tokens, labels, strict=True):
        things = tuple(group[token][i] for i in things)  # each thing goes where this permutation sends it
        assert group[label] == things
    assert len(set(labels.tolist())) > 20


@pytest.mark.parametrize(("moved", "count"), [(2, 11), (3, 31), (4, 76), (5, 120)])
def test_permutations_that_move_few_things(moved, count):
    """None and 10 swaps; 20 cycles of three; 30 of four and 15 pairs of swaps; 24 of five and 20 of three and two."""
    tokens, labels = make_row(Options(problem="s5", moved=moved), 2000, 0)
    assert len(set(tokens.tolist())) == count
    group = list(itertools.permutations(range(5)))
    assert max(sum(i != to for i, to in enumerate(group[token])) for token in tokens) == moved
    assert len(set(labels.tolist())) == 120


def test_rows_are_the_same_again_and_never_those_of_training():
    for problem in ("mqar", "needle", "parity", "s5"):
        options = Options(problem=problem, vocab=64)
        rows = [make_row(options, 64, i, training)[0] for training in (False, True) for i in range(5)]
        assert len({row.tobytes() for row in rows}) == 10
        assert np.array_equal(make_row(options, 64, 4)[0], rows[4])


def test_accuracies(lm, tmp_path, monkeypatch):
    """A model that adds up all but the first bit: right at each where that bit is 0, else nowhere."""
    monkeypatch.setattr(lm, "greedy", lambda tokens: [torch.from_numpy((tokens.cumsum(1) - tokens[:, :1]) % 2)])
    task = Synthetic(Options(problem="parity", lengths=[8, 16], samples=20), lm, None)
    results = {}
    for length in (8, 16):
        items = [item for item in task.items() if item.tokens == length]
        results |= {item.key: r for item, r in zip(items, task.run(items), strict=True)}
    figures, table = task.report(results, tmp_path)
    for length in (8, 16):
        zeros = sum(make_row(Options(problem="parity"), length, i)[0][0] == 0 for i in range(20)) / 20
        assert 0 < zeros < 1
        assert figures[str(length)] == pytest.approx({"accuracy": zeros, "last": zeros, "whole": zeros})
    assert "by chance 50 %" in table


def test_what_does_not_fit_is_refused(lm):
    with pytest.raises(ValueError, match=r"mqar needs synthetic.gap=0 tokens and 4 for each of synthetic.pairs=20"):
        Options(lengths=[64], pairs=20)
    Options("needle", [41], pairs=4, repeats=3, gap=9)
    with pytest.raises(ValueError, match=r"needle needs synthetic.gap=10 tokens and 8 for each of synthetic.pairs=4"):
        Options("needle", [41], pairs=4, repeats=3, gap=10)
    with pytest.raises(ValueError, match=r"set model.vocab_size=8192"):
        Synthetic(Options(), lm, None)
    with pytest.raises(ValueError, match=r"synthetic.moved must lie in \[2, 5\], got 1"):
        Options("s5", moved=1)
    with pytest.raises(ValueError, match=r"problem = 'xor': must be"):
        Options(problem="xor")


def test_a_reader_goes_on():
    options = Options(problem="s5", lengths=[4, 6])
    reader, other = SyntheticReader(options, 2), SyntheticReader(options, 2)
    first, second, third = (next(reader) for _ in range(3))
    assert [b.tokens.shape for b in (first, second, third)] == [(2, 4), (2, 6), (2, 4)]
    next(other)
    again = SyntheticReader(options, 2)
    again.load_state_dict(other.state_dict())
    assert torch.equal(next(again).tokens, second.tokens) and torch.equal(next(again).labels, third.labels)


@pytest.mark.slow
def test_a_model_learns_parity(tmp_path, capsys):
    """And its run goes on where it stopped, and is evaluated without a tokenizer."""
    settings = [
        f"run.dir={tmp_path}/run", "model.vocab_size=2", "model.dim=32", "model.window=8", "train.lr=1e-2", "train.micro_batch=32",
        "train.global_batch=32", "train.eval_every=0", "synthetic.problem=parity", "synthetic.lengths=[4]",
    ]  # fmt: skip
    assert train_synthetic("tiny", [*settings, "train.steps=5"]) == 0
    assert train_synthetic("tiny", [*settings, "train.steps=120"]) == 0
    command = ["eval", f"{tmp_path}/run", "--tasks", "synthetic", "synthetic.problem=parity", "synthetic.lengths=[4]"]
    assert cli.main([*command, "synthetic.samples=64", "--at-once", "64"]) == 0
    row = capsys.readouterr().out.splitlines()[-2]
    assert float(row.split("|")[2]) > 95
