"""data.on_bad_shard=skip on many ranks: what one cannot read, none reads, and all have the same rows."""

import json

import pytest
import torch
from corpora import make_config, together, write_corpus

from titans_pretrain.data import ShardError, build_reader

BAD = "train-000001.tar"
DOCUMENT = 60  # padded to a row of 64


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("titans_pretrain.data.storage.FIRST_PAUSE", 0.001)
    write_corpus(tmp_path / "c", [DOCUMENT] * 24)
    return tmp_path / "c"


def rows_of(batches, contexts: int) -> list:
    """[(tokens, positions)] of rows from the batches of all ranks, by rank: contexts fastest."""
    rows = []
    for step in zip(*batches, strict=True):
        for start in range(0, len(step), contexts):
            parts = step[start : start + contexts]
            whole = [torch.cat([getattr(part, name) for part in parts], 1) for name in ("tokens", "positions")]
            rows += zip(*(tensor.tolist() for tensor in whole), strict=True)
    return rows


def fail(reader, name: str) -> None:
    """This rank cannot get one file when it opens a window."""
    (source,) = reader._sources
    local = source.folder.local

    def broken(wanted, *args, **options):
        if wanted == name:
            raise ShardError(f"{name}: hiccup")
        return local(wanted, *args, **options)

    source.folder.local = broken


def read_together(config, steps: int, break_one, broken: int = 1):
    """Two data ranks of two context ranks each; break_one(reader, step) before each step on one of them."""

    def work(rank, gather):
        place = {"rank": rank // 2, "world": 2, "context_rank": rank % 2, "context_size": 2}
        reader = build_reader(config, gather=gather, **place)
        batches = []
        for step in range(steps):
            if rank == broken:
                break_one(reader, step)
            batches.append(next(reader))
        return batches, json.dumps(reader.state_dict()), sorted(reader.skipped)

    batches, states, skipped = zip(*together(4, work), strict=True)
    assert len(set(states)) == 1
    return rows_of(batches, 2), json.loads(states[0]), skipped


@pytest.mark.parametrize("name", [BAD, BAD + ".idx.npy"])
@pytest.mark.parametrize("broken", [0, 3])
def test_a_shard_that_one_rank_cannot_open_is_left_out_by_all(folder, name, broken):
    config = make_config(folder, on_bad_shard="skip")
    found, state, skipped = read_together(config, 9, lambda r, step: step or fail(r, name), broken)
    (folder / BAD).unlink()
    (folder / (BAD + ".idx.npy")).unlink()
    alone = build_reader(config)
    expected = rows_of([[next(alone) for _ in range(18)]], 1)
    assert found == expected
    assert state["sources"][0]["left_out"] == [1] and set(map(tuple, skipped)) == {(BAD,)}


def test_a_shard_that_one_rank_can_no_longer_read_is_padding_for_all_from_that_batch_on(folder):
    write_corpus(folder, [DOCUMENT] * 24, shard_size=1 << 14)
    config = make_config(folder, on_bad_shard="skip")
    whole = build_reader(config)
    expected = rows_of([[next(whole) for _ in range(18)]], 1)

    def lose(reader, step):
        if step != 2:
            return
        window = reader._sources[0]._window

        def lost(*where):
            raise ShardError("the disk is gone")

        window._files[window._numbers.index(1)].read_into = lost

    found, state, _ = read_together(config, 9, lose, broken=3)
    tokens = {tuple(row[0]) for row in documents_in(folder, BAD)}
    padded = 0
    for number, ((row, positions), (true_row, true_positions)) in enumerate(zip(found, expected, strict=True)):
        if number >= 2 * 2 and tuple(true_row[:DOCUMENT]) in tokens and set(positions) == {-1}:
            padded += 1  # whole, on both context ranks
        else:
            assert (row, positions) == (true_row, true_positions)
    late = [i for i, (row, _) in enumerate(expected) if tuple(row[:DOCUMENT]) in tokens and i >= 4]
    # the rank that lost it reads only its own rows: before its first one nobody knows
    first = next(i for i in late if i % 2 == 1)
    assert padded == sum(i // 2 >= first // 2 for i in late) > 1
    assert state["sources"][0]["left_out"] == []


def documents_in(folder, shard):
    import numpy as np

    index = np.load(folder / (shard + ".idx.npy"))
    content = (folder / shard).read_bytes()
    for offset, size in index.tolist():
        yield [np.frombuffer(content[offset : offset + size], "<u2").tolist()]


def test_ranks_that_cannot_agree_are_refused(folder):
    with pytest.raises(ValueError, match="agree"):
        build_reader(make_config(folder, on_bad_shard="skip"), context_size=2)


def test_a_whole_step_of_unreadable_rows_is_drawn_again(tmp_path, monkeypatch):
    """A tar that is missing when its window opens takes no rows; training and the cursor go past it."""
    monkeypatch.setattr("titans_pretrain.data.storage.FIRST_PAUSE", 0.001)
    write_corpus(tmp_path / "c", [64 * 20] + [64] * 20, shard_size=4096)
    (tmp_path / "c" / "train-000000.tar").unlink()
    reader = build_reader(make_config(tmp_path / "c", on_bad_shard="skip"), epochs=1)
    batches = list(reader)
    assert len(batches) == 20 and all((batch.labels != -100).any() for batch in batches)
    assert list(reader.skipped) == ["train-000000.tar"]


def test_manifests_are_downloaded_once_a_machine_and_must_be_equal(tmp_path, monkeypatch):
    import fsspec

    write_corpus(tmp_path / "c", [DOCUMENT] * 8)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "c"), "/once", recursive=True)
    opened = []
    original = type(memory)._open
    monkeypatch.setattr(
        type(memory), "_open", lambda self, path, *a, **k: opened.append(path) or original(self, path, *a, **k)
    )
    config = make_config("memory://once", cache_dir=str(tmp_path / "cache"))
    together(3, lambda rank, gather: build_reader(config, rank=rank, world=3, gather=gather))
    assert [path for path in opened if path.endswith("manifest.json")] == ["/once/manifest.json"]

    def other(rank, gather):  # each rank on a machine of its own, with a copy of its own
        copy = tmp_path / f"copy{rank}"
        write_corpus(copy, [DOCUMENT] * 8, seed=rank)
        return build_reader(make_config(copy), rank=rank, world=2, gather=gather)

    with pytest.raises(ValueError, match="not the same corpus on every process"):
        together(2, other)
    memory.rm("/once", recursive=True)


def test_an_error_of_the_process_that_reads_first_is_told_by_all(tmp_path):
    def work(rank, gather):
        with pytest.raises(ValueError, match="has finished"):
            build_reader(make_config(tmp_path / "none"), rank=rank, world=2, gather=gather)
        return rank

    assert together(2, work) == [0, 1]
