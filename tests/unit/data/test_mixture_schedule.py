"""Weights that change at given tokens: against a walk in plain Python, and against runs that are stopped there and go on with others."""

import json

import pytest
from corpora import make_config, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cursor import CORPORA, samples_of

from titans_pretrain.config import load_config
from titans_pretrain.data import build_reader, epoch_size

SEQ_LEN = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    for seed, (name, lengths) in enumerate(CORPORA.items()):
        write_corpus(root / name, lengths, seed=seed, validation=[20, 90, 33])
    return root


def named(folders, weights: dict) -> dict:
    return {str(folders / name): weight for name, weight in weights.items()}


def config_of(folders, stages, micro_batch=1, seed=0):
    """stages: (tokens, weights by name), the first one from 0 tokens on."""
    (_, first), *later = stages
    schedule = [[tokens, named(folders, weights)] for tokens, weights in later]
    return make_config(
        mixture=named(folders, first), mixture_schedule=schedule, micro_batch=micro_batch, seed=seed, seq_len=SEQ_LEN
    )


def rows_by_hand(folders, stages, count: int, seed=0) -> list:
    """Row by row: which corpus is furthest behind its share since the weights last changed; each corpus in its own order. Of weights
    whose sums are exact, so that ties are ties here too."""
    names = sorted({name for _, weights in stages for name in weights})
    reader = build_reader(make_config(mixture=named(folders, dict.fromkeys(names, 1.0))))
    order = [source.folder.path.rpartition("/")[2] for source in reader._sources]  # ties go to the first
    streams = {name: iter(samples_of(make_config(folders / name, seed=seed), 1, count)[0]) for name in names}
    found, weights, drawn = [], None, {}
    for row in range(count):
        holds = [mixture for tokens, mixture in stages if tokens <= row * SEQ_LEN][-1]
        if holds != weights:
            weights, drawn = holds, dict.fromkeys(names, 0)
        rows = sum(drawn.values()) + 1
        behind = {name: w / sum(weights.values()) * rows - drawn[name] for name, w in weights.items()}
        name = max((name for name in order if name in weights), key=lambda name: behind[name])
        drawn[name] += 1
        found.append(next(streams[name]))
    return found


@st.composite
def schedules(draw) -> list:
    weights = st.dictionaries(st.sampled_from(sorted(CORPORA)), st.sampled_from([1.0, 0.5, 3.0, 0.125]), min_size=1)
    starts = draw(st.lists(st.integers(1, 30 * SEQ_LEN), max_size=3, unique=True))
    return [(tokens, draw(weights)) for tokens in [0, *sorted(starts)]]


@settings(max_examples=20, deadline=None)
@given(
    schedules(), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5)), min_size=1, max_size=4)
)
def test_rows_are_those_of_the_walk_whoever_reads_them(folders, stages, parts):
    """parts: ranks, micro-batch and steps until a restart."""
    rows, state = [], None
    for world, micro_batch, steps in parts:
        more, state = samples_of(config_of(folders, stages, micro_batch), world, steps, state)
        rows += more
    assert rows == rows_by_hand(folders, stages, len(rows))
    assert state["tokens"] == len(rows) * SEQ_LEN


def test_a_change_is_a_restart_with_other_weights(folders):
    """At the first row that begins at or after so many tokens; in the middle of a batch."""
    before, after = {"a": 3.0, "b": 1.0}, {"b": 1.0, "c": 2.0}
    scheduled, _ = samples_of(config_of(folders, [(0, before), (7 * SEQ_LEN - 1, after)], 4), 1, 5)
    rows, state = samples_of(config_of(folders, [(0, before)]), 1, 7)
    more, _ = samples_of(config_of(folders, [(0, after)]), 1, 13, state)
    assert scheduled == rows + more
    same, _ = samples_of(config_of(folders, [(0, before), (7 * SEQ_LEN, after)], 4), 1, 5)
    assert same == scheduled
    later, _ = samples_of(config_of(folders, [(0, before), (7 * SEQ_LEN + 1, after)], 4), 1, 5)
    assert later[:7] == scheduled[:7] and later != scheduled


def test_equal_weights_change_nothing(folders):
    weights = {"a": 1.0, "b": 0.7}
    plain, _ = samples_of(config_of(folders, [(0, weights)]), 1, 30)
    assert samples_of(config_of(folders, [(0, weights), (5 * SEQ_LEN, weights)]), 1, 30)[0] == plain


def test_shares_count_from_the_change(folders):
    stages = [(0, {"a": 1.0, "b": 9.0}), (100 * SEQ_LEN, {"a": 9.0, "b": 1.0})]
    _, state = samples_of(config_of(folders, stages), 1, 300)
    assert {source["weight"]: source["drawn"] for source in state["sources"]} == {9.0: 180, 1.0: 20}


def test_what_was_read_ahead_does_not_count(folders, monkeypatch):
    monkeypatch.setattr("titans_pretrain.data.reader.SLOW", 0.0)  # one batch ahead, always
    stages = [(0, {"a": 1.0}), (4 * SEQ_LEN, {"b": 1.0}), (6 * SEQ_LEN, {"a": 1.0, "b": 1.0})]
    reader = build_reader(config_of(folders, stages, 2))
    rows = []
    for step in range(5):
        if step == 2:  # as a checkpoint would have it
            cursor = json.loads(json.dumps(reader.state_dict()))
            assert cursor["tokens"] == 4 * SEQ_LEN
            reader = build_reader(config_of(folders, stages, 2))
            reader.load_state_dict(cursor)
        batch = next(reader)
        if reader._ahead is not None:
            reader._ahead[1].result()
        rows += [tuple(tuple(tensor[i].tolist()) for tensor in batch) for i in range(2)]
    assert rows == rows_by_hand(folders, stages, 10)


def test_validation_reads_the_first_mixture(folders):
    plain = build_reader(config_of(folders, [(0, {"a": 1.0})]), split="validation", epochs=1)
    scheduled = build_reader(config_of(folders, [(0, {"a": 1.0}), (SEQ_LEN, {"b": 1.0})]), split="validation", epochs=1)
    assert [b.tokens.tolist() for b in plain] == [b.tokens.tolist() for b in scheduled]


def test_a_folder_that_is_not_there_is_found_at_the_start(folders):
    with pytest.raises(ValueError, match=r"nowhere.*titans-data tokenize"):
        build_reader(config_of(folders, [(0, {"a": 1.0}), (10**12, {"nowhere": 1.0})]))


def test_a_cursor_that_counted_no_tokens_has_no_schedule(folders):
    """Of an earlier release; and what is read on from it does not pretend to know."""
    _, state = samples_of(config_of(folders, [(0, {"a": 1.0})]), 1, 5)
    del state["tokens"]
    _, later = samples_of(config_of(folders, [(0, {"a": 1.0})]), 1, 5, state)
    assert "tokens" not in later
    for cursor in (state, later):
        with pytest.raises(ValueError, match="data.mixture_schedule counts tokens"):
            samples_of(config_of(folders, [(0, {"a": 1.0}), (SEQ_LEN, {"b": 1.0})]), 1, 1, cursor)


def test_an_epoch_is_that_of_all_corpora(folders):
    """As `plan`, `epochs` and the warnings before a run count it."""
    a, b = (str(folders / name) for name in "ab")
    config = load_config(None, [f'data.mixture={{"{a}": 1}}', f'data.mixture_schedule=[[9,{{"{b}": 1}}]]'])
    assert epoch_size(config)[0] == sum(CORPORA["a"]) + sum(CORPORA["b"])
