"""Killed and resumed anywhere, on any number of ranks, the reader gives what it would have given uninterrupted."""

import json
from functools import cache

import pytest
from corpora import make_config, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_pretrain.data import build_reader, source

CORPORA = {
    "a": [5, 64, 100, 3, 17, 31, 64, 9, 250, 12, 77, 8],
    "b": [30] * 17,
    "c": [700, 1, 2, 3, 64, 65, 66],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    for seed, (name, lengths) in enumerate(CORPORA.items()):
        write_corpus(root / name, lengths, seed=seed)
    return root


def samples_of(config, world: int, steps: int, state=None) -> tuple[list, dict]:
    """The global sequence of rows that `world` ranks read in some steps, and the cursor after them."""
    readers = [build_reader(config, rank=rank, world=world) for rank in range(world)]
    for reader in readers:
        if state is not None:
            reader.load_state_dict(state)
    rows = []
    for _ in range(steps):
        for reader in readers:
            batch = next(reader)
            rows += [tuple(tuple(tensor[i].tolist()) for tensor in batch) for i in range(len(batch.tokens))]
    states = [json.dumps(reader.state_dict()) for reader in readers]
    assert len(set(states)) == 1, "ranks disagree about the cursor"
    return rows, json.loads(states[0])


mixtures = st.dictionaries(st.sampled_from(sorted(CORPORA)), st.sampled_from([1.0, 0.5, 3.0, 0.1]), min_size=1)
stages = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=4
)  # world size, micro-batch, steps until the kill


@settings(max_examples=20, deadline=None)
@given(mixtures, stages, st.integers(0, 3), st.booleans())
def test_concatenated_streams_equal_the_uninterrupted_one(folders, mixture, stages, seed, split_long_documents):
    def config(micro_batch):
        paths = {str(folders / name): weight for name, weight in mixture.items()}
        return make_config(mixture=paths, seed=seed, micro_batch=micro_batch, split_long_documents=split_long_documents)

    rows, state = [], None
    for world, micro_batch, steps in stages:
        part, state = samples_of(config(micro_batch), world, steps, state)
        rows += part
    assert rows == samples_of(config(1), 1, len(rows))[0]


@settings(max_examples=15, deadline=None)
@given(stages, st.integers(0, 3))
def test_small_windows(folders, stages, seed):
    """The same with several windows to an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titans_pretrain.data.window.WINDOW_SHARDS", 1)
        rows, state = [], None
        for world, micro_batch, steps in stages:
            part, state = samples_of(
                make_config(folders / "a", seed=seed, micro_batch=micro_batch), world, steps, state
            )
            rows += part
        assert rows == samples_of(make_config(folders / "a", seed=seed), 1, len(rows))[0]


@cache
def epoch_length(path) -> int:
    return len(list(build_reader(make_config(path), epochs=1)))


def test_mixture_keeps_its_weights(folders):
    weights = {str(folders / "a"): 1.0, str(folders / "b"): 2.0, str(folders / "c"): 5.0}
    _, state = samples_of(make_config(mixture=weights), 1, 800)
    by_weight = {source["weight"]: source["drawn"] for source in state["sources"]}
    assert by_weight == {1.0: 100, 2.0: 200, 5.0: 500}


def test_mixture_reads_each_corpus_as_it_would_alone(folders):
    a, b = folders / "a", folders / "b"
    rows, _ = samples_of(make_config(mixture={str(a): 1.0, str(b): 1.0}), 1, 60)
    alone = {path: samples_of(make_config(path), 1, 30)[0] for path in (a, b)}
    assert sorted(rows) == sorted(alone[a] + alone[b])
    for path in (a, b):
        members = set(alone[path])
        assert [row for row in rows if row in members] == alone[path]


def test_order_of_keys_does_not_matter(folders):
    a, b = str(folders / "a"), str(folders / "b")
    one, _ = samples_of(make_config(mixture={a: 1.0, b: 0.7}), 1, 30)
    other, _ = samples_of(make_config(mixture={b: 0.7, a: 1.0}), 1, 30)
    assert one == other


def test_weights_may_change_on_resume(folders):
    """A later stage of training mixes differently: shares count from there, each corpus goes on where it was."""
    a, b, c = (str(folders / name) for name in "abc")
    rows, state = samples_of(make_config(mixture={a: 1.0, b: 3.0}), 1, 40)
    more, state = samples_of(make_config(mixture={a: 1.0, b: 1.0, c: 2.0}), 1, 40, state)
    assert sorted(source["drawn"] for source in state["sources"]) == [10, 10, 20]
    members = set(samples_of(make_config(a), 1, 20)[0])
    assert [row for row in rows + more if row in members] == samples_of(make_config(a), 1, 20)[0]


def test_a_corpus_that_leaves_and_comes_back_goes_on_where_it_was(folders):
    a, b, c = (str(folders / name) for name in "abc")
    rows, state = samples_of(make_config(mixture={a: 1.0, b: 1.0}), 1, 20)
    for mixture in ({b: 1.0}, {b: 2.0, c: 1.0}):
        more, state = samples_of(make_config(mixture=mixture), 2, 10, json.loads(json.dumps(state)))
        rows += more
    more, state = samples_of(make_config(mixture={a: 1.0, b: 1.0, c: 2.0}), 1, 40, state)
    rows += more
    assert sorted(source["drawn"] for source in state["sources"]) == [10, 10, 20] and state["absent"] == []
    for path in (a, b, c):
        alone = samples_of(make_config(path), 1, 80)[0]
        found = [row for row in rows if row in alone]
        assert found == alone[: len(found)] and len(found) >= 16


def test_cursors_of_releases_that_kept_no_absent_corpora(folders):
    rows, state = samples_of(make_config(folders / "a"), 1, 9)
    del state["absent"]
    more, _ = samples_of(make_config(folders / "a"), 1, 9, state)
    assert rows + more == samples_of(make_config(folders / "a"), 1, 18)[0]


def test_a_cursor_counts_what_was_given_and_not_what_was_read_ahead(folders, monkeypatch):
    monkeypatch.setattr("titans_pretrain.data.reader.SLOW", 0.0)  # one batch ahead, always
    reader = build_reader(make_config(folders / "a", micro_batch=2))
    for step in range(5):
        next(reader)
        reader._ahead[1].result()
        (source,) = reader.state_dict()["sources"]
        assert source["drawn"] == 2 * (step + 1)
    reader.load_state_dict(reader.state_dict())  # drops the batch that was read ahead
    one = next(reader)
    again = build_reader(make_config(folders / "a", micro_batch=2))
    assert [b.tokens.tolist() for b in (next(again) for _ in range(6))][5] == one.tokens.tolist()


@pytest.mark.parametrize("limit", [1, 7, 12])
def test_a_number_of_rows_is_the_same_rows_for_any_number_of_ranks(folders, limit):
    """As validation reads them: also twice, and in a mixture that ends before."""
    config = make_config(mixture={str(folders / "a"): 1.0, str(folders / "b"): 2.0}, micro_batch=2)
    expected = samples_of(config, 1, 6)[0][:limit]
    for world in (1, 2, 3, 5):
        readers = [build_reader(config, rank=rank, world=world, epochs=1, rows=limit) for rank in range(world)]
        start = readers[0].state_dict()
        for _ in range(2):
            rows = []
            for batches in zip(*readers, strict=True):
                for batch in batches:
                    rows += [tuple(tuple(tensor[i].tolist()) for tensor in batch) for i in range(2)]
            assert len(rows) == -(-limit // (2 * world)) * 2 * world
            assert rows[:limit] == expected
            assert all(set(positions) == {-1} and set(labels) == {-100} for _, labels, positions in rows[limit:])
            for reader in readers:
                reader.load_state_dict(start)


def test_epochs_of_a_mixture_end_with_its_last_corpus(folders):
    a, b = folders / "a", folders / "b"
    reader = build_reader(make_config(mixture={str(a): 1.0, str(b): 9.0}), epochs=1)
    assert len(list(reader)) == epoch_length(a) + epoch_length(b)


@pytest.mark.parametrize(
    "change, message",
    [({"seed": 5}, "seed=0"), ({"seq_len": 128}, "seq_len=64"), ({"multiple": 16}, "document_multiple=8")],
)
def test_cursor_of_another_order_is_refused(folders, change, message):
    _, state = samples_of(make_config(folders / "a"), 1, 3)
    with pytest.raises(ValueError, match=message):
        build_reader(make_config(folders / "a", **change)).load_state_dict(state)


def test_cursor_of_another_corpus_is_refused(folders):
    _, state = samples_of(make_config(folders / "a"), 1, 3)
    with pytest.raises(ValueError, match="another corpus"):
        build_reader(make_config(folders / "b")).load_state_dict(state)


def test_cursor_survives_a_move_of_the_folder(folders, tmp_path):
    rows, state = samples_of(make_config(folders / "a"), 1, 9)
    (folders / "a").rename(tmp_path / "moved")
    try:
        more, _ = samples_of(make_config(tmp_path / "moved"), 1, 9, state)
    finally:
        (tmp_path / "moved").rename(folders / "a")
    assert rows + more == samples_of(make_config(folders / "a"), 1, 18)[0]


def test_resuming_opens_no_window_but_its_own(folders, monkeypatch):
    """Opening one may mean to download it."""
    monkeypatch.setattr("titans_pretrain.data.window.WINDOW_SHARDS", 1)
    opened = []

    class Watched(source.Window):
        def __init__(self, folder, manifest, split, shards, *rest, **options):
            opened.append(shards)
            super().__init__(folder, manifest, split, shards, *rest, **options)

    config = make_config(folders / "c")
    _, state = samples_of(config, 1, 20)
    monkeypatch.setattr(source, "Window", Watched)
    reader = build_reader(config)
    reader.load_state_dict(state)
    assert opened == []
    next(reader)
    assert opened[0] == reader._sources[0]._windows(state["sources"][0]["epoch"])[state["sources"][0]["window"]]


def test_left_out_shards_stay_left_out_until_the_window_ends(folders, tmp_path, monkeypatch):
    """A shard that comes back in the middle of a window must not move the documents of the others."""
    monkeypatch.setattr("titans_pretrain.data.storage.FIRST_PAUSE", 0.001)
    write_corpus(tmp_path / "c", [60] * 24)
    index = tmp_path / "c" / "train-000001.tar.idx.npy"
    content = index.read_bytes()
    index.unlink()
    config = make_config(tmp_path / "c", on_bad_shard="skip")
    whole, _ = samples_of(config, 1, 15)
    rows, state = samples_of(config, 1, 5)
    index.write_bytes(content)
    more, state = samples_of(config, 1, 10, state)
    assert rows + more == whole
    assert state["sources"][0]["left_out"] == [1]
