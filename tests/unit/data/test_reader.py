"""What a batch holds: every token once, its label, its position."""

from collections import Counter

import numpy as np
import pytest
import torch
from corpora import EOS, edit_manifest, make_config, write_corpus

from titans_pretrain.data import ShardError, build_reader, open_manifest, unigram_counts, unigram_entropy
from titans_pretrain.data.storage import Folder


def pieces_of(tokens, labels, positions):
    """The documents, or parts of documents, of one row: (tokens, labels)."""
    pieces = []
    for token, label, position in zip(tokens.tolist(), labels.tolist(), positions.tolist()):
        if position == -1:
            assert label == -100
            continue
        if position == 0:
            pieces.append(([], []))
        piece = pieces[-1]
        assert position == len(piece[0])
        piece[0].append(token)
        piece[1].append(label)
    return pieces


def rows(reader):
    for batch in reader:
        assert all(tensor.dtype == torch.int64 for tensor in batch)
        yield from zip(*batch)


@pytest.mark.parametrize("split_long_documents", [True, False])
@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_every_token_once_with_its_label(corpus, split_long_documents, multiple):
    folder, documents = corpus
    config = make_config(folder, multiple=multiple, micro_batch=2, split_long_documents=split_long_documents)
    transitions, tokens = Counter(), Counter()
    for row in rows(build_reader(config, epochs=1)):
        assert len(row[0]) == 64
        for i in (row[2] == 0).nonzero():
            assert i % multiple == 0
        for piece, labels in pieces_of(*row):
            tokens.update(piece)
            assert labels[:-1] == piece[1:]
            assert (labels[-1] == -100) == (piece[-1] == EOS)
            transitions.update(zip(piece, labels))
            if not split_long_documents and len(piece) < 64:
                assert piece[-1] == EOS, "a document that fits was cut"
    assert tokens == Counter(token for document in documents for token in document)
    expected = Counter()
    for document in documents:
        expected.update(zip(document, [*document[1:], -100]))
    assert transitions == expected


def test_documents_are_whole_where_they_fit(corpus):
    folder, documents = corpus
    seen = []
    for row in rows(build_reader(make_config(folder, seq_len=1024), epochs=1)):
        seen += [piece for piece, _ in pieces_of(*row)]
    assert sum(piece in documents for piece in seen) >= len(documents) - 2  # one sample ends inside a document


def test_concatenation_has_no_resets(corpus):
    folder, documents = corpus
    config = make_config(folder, seq_len=50, reset_documents=False)  # any length: documents start anywhere
    stream = {}
    batches = list(rows(build_reader(config, epochs=1)))
    full = 0
    for tokens, labels, positions in batches:
        n = int((positions >= 0).sum())
        assert positions.tolist() == [*range(n), *[-1] * (50 - n)]
        assert labels[: n - 1].tolist() == tokens[1:n].tolist()
        assert (labels[n:] == -100).all()
        full += n
        if n < 50:
            assert labels[n - 1] == -100
        else:
            stream[tuple(tokens.tolist())] = int(labels[-1])
    assert full == sum(map(len, documents))
    # the last label is the first token of the row that follows on the stream
    firsts = Counter(int(tokens[0]) for tokens, _, _ in batches)
    assert not Counter(stream.values()) - firsts - Counter({-100: 1})


def test_epochs_differ_and_repeat(corpus):
    folder, _ = corpus
    one = [tuple(row[0].tolist()) for row in rows(build_reader(make_config(folder), epochs=2))]
    again = [tuple(row[0].tolist()) for row in rows(build_reader(make_config(folder), epochs=2))]
    other = [tuple(row[0].tolist()) for row in rows(build_reader(make_config(folder, seed=1), epochs=2))]
    assert one == again
    assert one != other
    half = len(one) // 2
    assert one[:half] != one[half:]


def test_windows_cover_all_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("titans_pretrain.data.window.WINDOW_SHARDS", 3)
    documents = write_corpus(tmp_path / "c", [20] * 100)
    assert len(open_manifest(Folder(str(tmp_path / "c"))).splits["train"]) > 9
    seen = [piece for row in rows(build_reader(make_config(tmp_path / "c"), epochs=1)) for piece, _ in pieces_of(*row)]
    tokens = Counter(token for piece in seen for token in piece)
    assert tokens == Counter(token for document in documents for token in document)


def test_context_parallel_columns(corpus):
    folder, _ = corpus
    whole = next(build_reader(make_config(folder, micro_batch=3)))
    parts = [
        next(build_reader(make_config(folder, micro_batch=3), context_rank=r, context_size=2, segments_per_rank=4))
        for r in range(2)
    ]
    for full, *split in zip(whole, *parts):
        pieces = [split[s % 2][:, (s // 2) * 8 : (s // 2 + 1) * 8] for s in range(8)]
        assert torch.equal(full, torch.cat(pieces, 1))


def test_last_batch_is_filled_with_inert_rows(tmp_path):
    write_corpus(tmp_path / "c", [64] * 5)
    batches = list(build_reader(make_config(tmp_path / "c", micro_batch=3), epochs=1))
    assert [int((b.positions[:, 0] == 0).sum()) for b in batches] == [3, 2]
    assert (batches[1].labels[2] == -100).all() and (batches[1].positions[2] == -1).all()


def test_validation_split(tmp_path):
    write_corpus(tmp_path / "c", [64] * 5, validation=[32, 32])
    (batch,) = build_reader(make_config(tmp_path / "c"), "validation", epochs=1)
    assert int((batch.positions == 0).sum()) == 2


def test_unigram_entropy(corpus):
    folder, documents = corpus
    counts = np.zeros(259, np.int64)
    for document in documents:
        np.add.at(counts, document, 1)
    assert unigram_counts(folder).tolist() == counts.tolist()
    share = counts[counts > 0] / counts.sum()
    assert unigram_entropy(folder) == pytest.approx(-(share * np.log(share)).sum())
    with pytest.raises(ValueError, match="no validation tokens"):
        unigram_entropy(folder, "validation")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seq_len": 60}, "multiple of 8"),
        ({"path": None}, "data.path is not set"),
        ({"path": "/nowhere"}, "manifest.json"),
        ({"on_bad_shard": "ignore"}, "on_bad_shard"),
        ({"mixture": {"a": -1.0}}, "positive"),
        ({"reset_documents": False, "split_long_documents": False}, "split_long_documents"),
    ],
)
def test_configurations_that_cannot_be(corpus, change, message):
    with pytest.raises(ValueError, match=message):
        build_reader(make_config(**{"path": corpus[0]} | change))


def test_vocabulary_must_fit(corpus):
    config = make_config(corpus[0])
    config.model.vocab_size = 100
    with pytest.raises(ValueError, match="vocab_size=100"):
        build_reader(config)


def test_empty_split_is_an_error(corpus):
    with pytest.raises(ValueError, match="no validation documents"):
        build_reader(make_config(corpus[0]), "validation")


def test_foreign_tokenizer_is_an_error(corpus):
    def change(document):
        document["tokenizer"]["fingerprint"] = "0" * 64

    edit_manifest(corpus[0], change)
    with pytest.raises(ValueError, match="not the tokenizer"):
        build_reader(make_config(corpus[0]))


def test_unfinished_folder_is_an_error(corpus):
    (corpus[0] / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has finished"):
        build_reader(make_config(corpus[0]))


def bad_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr("titans_pretrain.data.storage.FIRST_PAUSE", 0.001)
    folder = tmp_path / "bad"
    documents = write_corpus(folder, [60] * 24)
    assert len(list(folder.glob("*.tar"))) >= 4
    return folder, documents


@pytest.mark.parametrize("damage", ["truncated", "missing", "both missing", "index"])
def test_bad_shard_stops_with_its_name_or_is_skipped(tmp_path, monkeypatch, damage):
    folder, documents = bad_corpus(tmp_path, monkeypatch)
    shard = folder / "train-000001.tar"
    index = shard.with_name(shard.name + ".idx.npy")
    documents_in_shard = len(np.load(index))
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-3000])
    if damage in ("missing", "both missing"):
        shard.unlink()
    if damage == "both missing":
        index.unlink()
    if damage == "index":
        index.write_bytes(b"nonsense")
    with pytest.raises(ShardError, match="train-000001.tar"):
        list(build_reader(make_config(folder), epochs=1))
    reader = build_reader(make_config(folder, on_bad_shard="skip"), epochs=2)
    pieces = [piece for row in rows(reader) for piece, _ in pieces_of(*row)]
    tokens = Counter(token for piece in pieces for token in piece)
    bad = documents[documents_in_shard : 2 * documents_in_shard]  # every shard holds as many
    expected = Counter(token for document in documents if document not in bad for token in 2 * document)
    assert tokens == expected
    assert list(reader.skipped) == ["train-000001.tar"]


def test_shard_that_fails_while_it_is_read(tmp_path, monkeypatch):
    """The layout is made, then the disk goes bad: the rest stays where it was."""
    monkeypatch.setattr("titans_pretrain.data.reader.SLOW", 0.0)  # one batch ahead, always
    folder, documents = bad_corpus(tmp_path, monkeypatch)
    whole = [row for row in rows(build_reader(make_config(folder), epochs=1))]
    reader = build_reader(make_config(folder, on_bad_shard="skip"), epochs=1)
    stopping = build_reader(make_config(folder), epochs=1)
    first_row = next(reader)  # opens the shards
    next(stopping)
    reader._ahead[1].result()  # so far it is read
    shard = folder / "train-000001.tar"
    with open(shard, "r+b") as file:
        file.truncate(100)
    damaged = list(zip(*first_row, strict=True)) + list(rows(reader))
    assert len(damaged) == len(whole)
    lost = 0
    for (tokens, labels, positions), (tokens2, labels2, positions2) in zip(whole, damaged):
        kept = positions2 >= 0
        lost += int((~kept & (positions >= 0)).sum())
        assert torch.equal(tokens[kept], tokens2[kept]) and torch.equal(positions[kept], positions2[kept])
        assert ((labels == labels2) | (labels2 == -100)).all()
    size = len(np.load(folder / "train-000001.tar.idx.npy"))
    bad = documents[size : 2 * size]  # every shard holds as many, and a row one document
    assert lost == 60 * sum(tokens[:60].tolist() in bad for tokens, _, _ in whole[2:]) > 0
    assert list(reader.skipped) == ["train-000001.tar"]
    with pytest.raises(ShardError, match="train-000001.tar"):
        list(stopping)


def test_nothing_readable_is_an_error(tmp_path, monkeypatch):
    folder, _ = bad_corpus(tmp_path, monkeypatch)
    for path in folder.glob("*.tar*"):
        path.unlink()
    with pytest.raises(ShardError, match="no train shard can be read"):
        next(build_reader(make_config(folder, on_bad_shard="skip")))


def test_order_is_frozen(corpus):
    """A run of an older release must go on where it was: this may change only with ORDER_VERSION."""
    reader = build_reader(make_config(corpus[0], seed=3))
    lengths = [
        [len(piece) for row in zip(*next(reader), strict=True) for piece, _ in pieces_of(*row)] for _ in range(6)
    ]
    assert lengths == [[64], [29, 5, 24], [64], [64], [64], [16, 48]]
