"""Every row of several epochs, against an order computed anew in plain Python, document by document."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from corpora import make_config, write_corpus

from titans_pretrain.data import build_reader

PAD, SEQ_LEN, MULTIPLE, SHARDS = 258, 64, 8, 3
MASK = 2**64 - 1


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def key_of(*numbers: int) -> int:
    key = 0
    for number in numbers:
        key = mix((key + number) & MASK)
    return key


def shuffled(items: list, key: int) -> list:
    return [items[i] for i in sorted(range(len(items)), key=lambda i: mix((key + i) & MASK))]


def documents_of(folder: Path, shard: str) -> list[list[int]]:
    with tarfile.open(folder / shard) as tar:
        members = [m for m in tar.getmembers() if m.name.endswith(".tokens.bin")]
        contents = [tar.extractfile(m).read() for m in members]
    return [[int.from_bytes(c[i : i + 2], "little") for i in range(0, len(c), 2)] for c in contents]


def epoch_of(folder: Path, seed: int, epoch: int) -> list[list[tuple[int, int, int]]]:
    """Rows of (token, label, position)."""
    shards = json.loads((folder / "manifest.json").read_text())["splits"]["train"]["shards"]
    names = shuffled([shard["name"] for shard in shards], key_of(seed, epoch))
    found = []
    for number, start in enumerate(range(0, len(names), SHARDS), 1):  # windows
        key = key_of(seed, epoch, number)
        documents = [d for name in names[start : start + SHARDS] for d in documents_of(folder, name)]
        stream = []
        for document in shuffled(documents, key_of(key, 1)):
            stream += zip(document, [*document[1:], -100], range(len(document)), strict=True)
            stream += [(PAD, -100, -1)] * (-len(document) % MULTIPLE)
        stream += [(PAD, -100, -1)] * (-len(stream) % SEQ_LEN)
        rows = []
        for i in range(0, len(stream), SEQ_LEN):
            row, cut = stream[i : i + SEQ_LEN], stream[i][2]
            for j, (token, label, position) in enumerate(row):
                if position - j != cut or cut <= 0:
                    break
                row[j] = (token, label, j)  # the rest of a document is a document of its own
            rows.append(row)
        found += shuffled(rows, key_of(key, 2))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("twin")
    write_corpus(root / "many", [5, 64, 100, 3, 17, 31, 64, 9, 250, 12, 77, 8, 1, 2, 40], shard_size=2048)
    write_corpus(root / "one", [30, 70, 5, 64, 9, 130, 1], shard_size=1 << 20, seed=1)
    assert len(list((root / "many").glob("*.tar"))) > 2 * SHARDS and len(list((root / "one").glob("*.tar"))) == 1
    return root


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr("titans_pretrain.data.window.WINDOW_SHARDS", SHARDS)


def read(config, steps: int, world: int, contexts: int) -> list:
    """The rows of all ranks, put together from their columns."""
    place = [(r, c) for r in range(world) for c in range(contexts)]
    readers = [
        build_reader(config, rank=r, world=world, context_rank=c, context_size=contexts, segments_per_rank=2)
        for r, c in place
    ]
    found = []
    for _ in range(steps):
        batches = dict(zip(place, map(next, readers), strict=True))
        for r in range(world):
            parts = [
                torch.stack(batches[r, c], -1).chunk(2, 1) for c in range(contexts)
            ]  # [rows, columns, 3] in segments
            rows = torch.cat([parts[c][s] for s in range(2) for c in range(contexts)], 1)
            found += [[tuple(column) for column in row] for row in rows.tolist()]
    return found


@pytest.mark.parametrize("name", ["many", "one"])
@pytest.mark.parametrize("world, contexts", [(1, 1), (2, 1), (3, 2), (1, 4)])
def test_rows_of_all_ranks(folders, name, world, contexts):
    expected = [row for epoch in range(3) for row in epoch_of(folders / name, seed=5, epoch=epoch)]
    steps = len(expected) // (2 * world)
    found = read(make_config(folders / name, seed=5, micro_batch=2), steps, world, contexts)
    assert found == expected[: len(found)] and len(found) > 2 * len(expected) // 3


def test_epochs_differ_in_documents_beside_each_other_and_in_rows(folders):
    """Of one shard, where only the order of documents can: and the twin has it from the epoch alone."""
    first, second = (epoch_of(folders / "one", 5, epoch) for epoch in (0, 1))
    assert sorted(first) != sorted(second)


def test_a_mixture_draws_what_is_furthest_behind(folders):
    weights = {str(folders / "many"): 1.0, str(folders / "one"): 0.6}
    reader = build_reader(make_config(mixture=weights, seed=5, micro_batch=4), rank=1, world=3)
    order = [(source.folder.path, source.weight) for source in reader._sources]  # by fingerprint: ties go to the first
    streams = {path: iter([r for e in range(9) for r in epoch_of(Path(path), 5, e)]) for path, _ in order}
    drawn, rows = dict.fromkeys(streams, 0), []
    for number in range(1, 61):
        path, _ = max(order, key=lambda item: item[1] / 1.6 * number - drawn[item[0]])
        drawn[path] += 1
        rows.append(next(streams[path]))
    expected = [row for step in range(5) for row in rows[step * 12 + 4 : step * 12 + 8]]
    found = [[tuple(c) for c in row] for _ in range(5) for row in torch.stack(next(reader), -1).tolist()]
    assert found == expected
