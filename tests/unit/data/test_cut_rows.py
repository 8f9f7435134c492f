"""Shorter rows first: the same tokens and labels as without, cut differently, on any ranks and from any cursor on."""

import itertools

import pytest
import torch
from corpora import make_config, write_corpus

from titans_pretrain.data import build_reader

SEQ_LEN, MULTIPLE = 64, 8
LENGTHS = [5, 64, 100, 3, 17, 31, 64, 9, 250, 12, 77, 8, 40, 130, 23]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut") / "data"
    write_corpus(folder, LENGTHS, shard_size=2048)
    return folder


def read(config, lengths, world=1, contexts=1, segments=1, state=None):
    """The rows of all ranks after each other, whole again from their columns, one batch for each of `lengths`; and the cursor."""
    place = [(r, c) for r in range(world) for c in range(contexts)]
    readers = {
        (r, c): build_reader(
            config, rank=r, world=world, context_rank=c, context_size=contexts, segments_per_rank=segments
        )
        for r, c in place
    }
    rows = []
    for reader in readers.values():
        if state is not None:
            reader.load_state_dict(state)
    for length in lengths:
        batches = {}
        for at, reader in readers.items():
            reader.cut_rows(length)
            batches[at] = torch.stack(next(reader), -1)
            assert batches[at].shape == (config.train.micro_batch * SEQ_LEN // length, length // contexts, 3)
        for r in range(world):
            parts = [batches[r, c].chunk(segments, 1) for c in range(contexts)]
            rows += torch.cat([parts[c][s] for s in range(segments) for c in range(contexts)], 1).tolist()
    states = [reader.state_dict() for reader in readers.values()]
    assert all(state == states[0] for state in states)
    return rows, states[0]


def cut_by_hand(row: list, length: int) -> list:
    """A row's (token, label, position) as several rows: what goes on over a cut counts anew from there."""
    pieces = [[list(column) for column in row[i : i + length]] for i in range(0, len(row), length)]
    for piece in pieces:
        first = piece[0][2]
        for j, column in enumerate(piece):
            if first > 0 and column[2] == first + j:
                column[2] = j
    return pieces


DOCUMENTS = {
    "split": {},
    "whole": {"split_long_documents": False},
    "concatenated": {"reset_documents": False},
}
PLACES = {  # ranks, context-parallel ranks, segments on each; row lengths
    "one": (1, 1, 1, [8, 8, 16, 16, 64, 64]),
    "dp2": (2, 1, 1, [8, 16, 16, 64]),
    "cp2": (1, 2, 1, [16, 16, 32, 64]),
    "dp2-cp2-k2": (2, 2, 2, [32, 32, 64]),
}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("place", PLACES)
def test_the_stream_over_changes_of_length_is_the_uncut_one(corpus, place, documents):
    world, contexts, segments, lengths = PLACES[place]
    config = make_config(corpus, micro_batch=2, **DOCUMENTS[documents])
    found, cursor = read(config, lengths, world, contexts, segments)
    uncut, expected_cursor = read(config, [SEQ_LEN] * len(lengths), world)
    expected = []
    for number, row in enumerate(uncut):
        expected += cut_by_hand(row, lengths[number // (2 * world)])
    assert found == expected
    assert cursor == expected_cursor
    counts = [sum(position for row in rows for _, _, position in row) for rows in (found, uncut)]
    assert counts[0] < counts[1]  # documents were cut


def test_a_label_goes_over_a_cut_and_the_rest_of_the_document_begins_anew(corpus):
    rows, _ = read(make_config(corpus, micro_batch=2), [8] * 4)
    over = [(a, b) for i, (a, b) in enumerate(itertools.pairwise(rows)) if i % 8 < 7 and a[-1][1] != -100]
    assert over and all(b[0][0] == a[-1][1] and b[0][2] == 0 for a, b in over)


def test_what_was_read_ahead_is_cut_anew(corpus, monkeypatch):
    monkeypatch.setattr("titans_pretrain.data.reader.SLOW", 0.0)  # one batch ahead, always
    config = make_config(corpus, micro_batch=2)
    expected, _ = read(config, [16] * 2 + [64] * 4)
    reader, rows = build_reader(config), []
    for length in [16] * 2 + [64] * 4:
        if reader._ahead is not None:
            reader._ahead[1].result()
        reader.cut_rows(length)
        rows += torch.stack(next(reader), -1).tolist()
        assert reader._ahead is not None
    assert rows == expected


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resuming_goes_on_with_the_rows_not_yet_seen(corpus, stop):
    """On another number of ranks, at another micro-batch; before, at and after a change of length."""
    lengths = [16, 16, 32, 32, 64, 64]
    config = make_config(corpus, micro_batch=4)
    expected, _ = read(config, lengths)
    rows, state = read(config, lengths[:stop])
    more, _ = read(make_config(corpus, micro_batch=2), lengths[stop:], world=2, state=state)
    assert rows + more == expected


def test_a_shard_that_fails_is_padding_in_short_rows_too(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("titans_pretrain.data.storage.FIRST_PAUSE", 0.001)
    write_corpus(tmp_path / "c", [60] * 24)
    (tmp_path / "c/train-000001.tar").unlink()
    config = make_config(tmp_path / "c", on_bad_shard="skip")
    uncut, _ = read(config, [64] * 6)
    found, _ = read(config, [16] * 6)
    assert [column[:2] for row in found for column in row] == [column[:2] for row in uncut for column in row]
    assert found == [piece for row in uncut for piece in cut_by_hand(row, 16)]
