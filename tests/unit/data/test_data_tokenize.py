"""Shards: what is in them, and that neither workers nor interruptions change a byte."""

import errno
import hashlib
import json
import os
import pkgutil
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from prepared import SMALL, TOKENIZER, Killed, texts_of, write_lines

from titans_pretrain.data.manifest import MANIFEST
from titans_pretrain.data_prep.merge import merge
from titans_pretrain.data_prep.shards import ShardWriter, tar_sample
from titans_pretrain.data_prep.sources import InputFile
from titans_pretrain.data_prep.tokenize import CleanOptions, TokenizeOptions, files_of_part, tokenize
from titans_pretrain.data_prep.tokenizer import load_tokenizer
from titans_pretrain.data_prep.verify import verify

pytestmark = pytest.mark.usefixtures("quick_disk")


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_documents_arrive_once_and_in_order(inputs, tmp_path):
    folder, texts = inputs
    manifest = tokenize([str(folder)], TOKENIZER, tmp_path / "data", TokenizeOptions(**SMALL))
    train, validation = (texts_of(tmp_path / "data", split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]
    assert 5 < len(validation) < 40
    assert len(manifest.splits["train"]) > 3
    assert all(shard.bytes <= 20_000 + 1024 for shard in manifest.splits["train"])
    assert manifest.totals("train")["tokens"] == sum(len(text.encode()) + 1 for text in train)
    assert verify(tmp_path / "data") == []
    names = {path.name for path in (tmp_path / "data").iterdir()} - {".lock"}
    shards = {s.name for shards in manifest.splits.values() for s in shards}
    assert names == {MANIFEST, "tokenizer"} | shards | {name + ".idx.npy" for name in shards}


def test_shards_are_stock_webdataset(inputs, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    folder, texts = inputs
    tokenize([str(folder)], TOKENIZER, tmp_path / "data", TokenizeOptions(validation=0.0))
    samples = list(webdataset.WebDataset(str(tmp_path / "data" / "train-000000.tar"), shardshuffle=False))
    assert [TOKENIZER.decode(np.frombuffer(sample["tokens.bin"], "<u2")) for sample in samples] == texts
    metadata = json.loads(samples[41]["json"])
    assert (metadata["source"], metadata["record"]) == ("1.jsonl", 1)
    assert len({sample["__key__"] for sample in samples}) == len(texts)


@pytest.mark.parametrize("workers", [1, 3])
def test_result_does_not_depend_on_workers(inputs, tmp_path, workers, monkeypatch):
    monkeypatch.setattr("titans_pretrain.data_prep.tokenize.CHUNK_BYTES", 500)
    folder, _ = inputs
    options = TokenizeOptions(**SMALL, clean=CleanOptions(deduplicate=True))
    tokenize([str(folder)], TOKENIZER, tmp_path / "one", options)
    monkeypatch.setattr("titans_pretrain.data_prep.tokenize.CHUNK_BYTES", 3000)
    tokenize([str(folder)], TOKENIZER, tmp_path / "many", options, workers=workers)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "many")


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
@pytest.mark.parametrize("site", ["add", "checkpoint", "replace"])
def test_resume_from_every_moment(inputs, tmp_path, monkeypatch, site, checkpoint_seconds):
    """Stops the run at its n-th write, for many n, and lets it go on: the bytes are those of an undisturbed run."""
    monkeypatch.setattr("titans_pretrain.data_prep.tokenize.CHUNK_BYTES", 300)
    folder, _ = inputs
    options = TokenizeOptions(**SMALL, clean=CleanOptions(deduplicate=True))
    tokenize([str(folder)], TOKENIZER, tmp_path / "whole", options)
    calls = Counter()
    limit = 0

    def dying(original, after: bool):
        def call(*arguments):
            calls[site] += 1
            if calls[site] == limit and not after:
                raise Killed
            result = original(*arguments)
            if calls[site] == limit:
                raise Killed
            return result

        return call

    targets = {
        "add": "titans_pretrain.data_prep.shards.ShardWriter.add",
        "checkpoint": "titans_pretrain.data_prep.tokenize.write_text",
        "replace": "titans_pretrain.data_prep.shards.os.replace",
    }
    module, _, name = targets[site].rpartition(".")
    owner = pkgutil.resolve_name(module)
    original = getattr(owner, name)
    kills = 0
    for after in (False, True):
        out = tmp_path / f"out{after}"
        limit, step = 1, 29 if site == "add" else 2
        while True:
            calls.clear()
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, dying(original, after))
                try:
                    tokenize([str(folder)], TOKENIZER, out, options, checkpoint_seconds=checkpoint_seconds)
                    break
                except Killed:
                    kills += 1
                    assert kills < 500
                    limit += step
        assert hashes(out) == hashes(tmp_path / "whole")
    assert kills >= 2


def test_unfinished_run_reads_as_nothing(inputs, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from titans_pretrain.data import build_reader

    monkeypatch.setattr("titans_pretrain.data_prep.tokenize.Run.finish", lambda run: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        tokenize([str(inputs[0])], TOKENIZER, tmp_path / "data", TokenizeOptions(**SMALL))
    data = SimpleNamespace(
        path=str(tmp_path / "data"),
        seq_len=64,
        mixture={},
        reset_documents=True,
        split_long_documents=True,
        cache_dir=None,
        on_bad_shard="stop",
    )
    config = SimpleNamespace(
        data=data,
        train=SimpleNamespace(seed=0, micro_batch=1),
        model=SimpleNamespace(vocab_size=300, document_multiple=8),
    )
    with pytest.raises(ValueError, match="finished"):
        build_reader(config)
    with pytest.raises(ValueError, match="did not finish"):
        verify(tmp_path / "data")


def test_finished_run_is_left_alone(inputs, tmp_path):
    options = TokenizeOptions(**SMALL)
    tokenize([str(inputs[0])], TOKENIZER, tmp_path / "data", options)
    before = hashes(tmp_path / "data")
    tokenize([str(inputs[0])], TOKENIZER, tmp_path / "data", options)
    assert hashes(tmp_path / "data") == before
    with pytest.raises(ValueError, match="choose another"):
        tokenize([str(inputs[0])], TOKENIZER, tmp_path / "data", TokenizeOptions())


def dies_at(patch, name: str, call: int):
    """Kills at the given call of a method of Run, before it does anything."""
    calls = Counter()
    original = pkgutil.resolve_name(f"titans_pretrain.data_prep.tokenize.Run.{name}")

    def dying(*arguments):
        calls[name] += 1
        if calls[name] == call:
            raise Killed
        return original(*arguments)

    patch.setattr(f"titans_pretrain.data_prep.tokenize.Run.{name}", dying)


def test_run_with_other_options_does_not_go_on(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("titans_pretrain.data_prep.tokenize.CHUNK_BYTES", 500)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_at(patch, "append", 3)
        tokenize([str(inputs[0])], TOKENIZER, tmp_path / "data", TokenizeOptions(**SMALL), checkpoint_seconds=0)
    with pytest.raises(ValueError, match="unfinished run with other"):
        tokenize([str(inputs[0])], TOKENIZER, tmp_path / "data", TokenizeOptions())


def test_a_killed_run_that_wrote_nothing_stands_in_nobodys_way(inputs, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_at(patch, "append", 1)
        tokenize([str(inputs[0])], TOKENIZER, tmp_path / "data", TokenizeOptions(**SMALL))
    tokenize([str(inputs[0])], TOKENIZER, tmp_path / "data", TokenizeOptions())
    assert len(texts_of(tmp_path / "data", "train")) + len(texts_of(tmp_path / "data", "validation")) == 200


BAD_THIRD = ["a" * 400, "b" * 400, None, "c" * 400, None]  # None: a record that cannot be read


def write_with_bad(path: Path, texts) -> list[str]:
    path.write_text("".join("{\n" if text is None else json.dumps({"text": text}) + "\n" for text in texts))
    return [str(path)]


@pytest.mark.parametrize("chunk", [100, 1 << 20])  # with one document on disk before the bad one, and with none
def test_the_advice_to_skip_works_in_the_same_folder(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("titans_pretrain.data_prep.tokenize.CHUNK_BYTES", chunk)
    paths = write_with_bad(tmp_path / "a.jsonl", BAD_THIRD)
    out = tmp_path / "data"
    with pytest.raises(ValueError, match=r"a\.jsonl, record 2: .*--skip-bad-records"):
        tokenize(paths, TOKENIZER, out, TokenizeOptions(0.0), checkpoint_seconds=0)
    assert out.exists() == (chunk == 100)
    skip = TokenizeOptions(0.0, clean=CleanOptions(skip_bad_records=True))
    manifest = tokenize(paths, TOKENIZER, out, skip)
    tokenize(paths, TOKENIZER, tmp_path / "whole", skip)
    assert manifest.source["dropped"] == {"bad_record": 2}
    assert hashes(out) == hashes(tmp_path / "whole")
    with pytest.raises(ValueError, match="choose another"):  # without skipping this is not what comes out
        tokenize(paths, TOKENIZER, out, TokenizeOptions(0.0))


def test_a_run_that_skipped_does_not_go_on_without_skipping(tmp_path, monkeypatch):
    monkeypatch.setattr("titans_pretrain.data_prep.tokenize.CHUNK_BYTES", 100)
    paths = write_with_bad(tmp_path / "a.jsonl", BAD_THIRD)
    skip = TokenizeOptions(0.0, clean=CleanOptions(skip_bad_records=True))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_at(patch, "append", 4)
        tokenize(paths, TOKENIZER, tmp_path / "data", skip, checkpoint_seconds=0)
    with pytest.raises(ValueError, match="unfinished run with other"):
        tokenize(paths, TOKENIZER, tmp_path / "data", TokenizeOptions(0.0))


def test_a_failed_run_takes_nothing_of_others_along(tmp_path):
    paths = write_with_bad(tmp_path / "a.jsonl", [None])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="record 0"):
        tokenize(paths, TOKENIZER, tmp_path / "data", TokenizeOptions(0.0))
    assert (tmp_path / "data" / "notes.txt").read_text() == "precious"


def test_another_tokenizer_is_not_overwritten(inputs, tmp_path):
    load_tokenizer("nucleotide").save(tmp_path / "tokenizer")
    before = hashes(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="already holds another tokenizer"):
        tokenize([str(inputs[0])], TOKENIZER, tmp_path)
    tokenize([str(inputs[0])], TOKENIZER, tmp_path / "a", TokenizeOptions(0.0))
    with pytest.raises(ValueError, match="already holds another tokenizer"):
        merge([str(tmp_path / "a")] * 2, str(tmp_path))
    assert hashes(tmp_path / "tokenizer") == before


@pytest.mark.parametrize("pattern", ["(", "[a-", "*"])
def test_what_is_no_regular_expression(pattern):
    with pytest.raises(ValueError, match="--must-match .* is no regular expression"):
        CleanOptions(must_match=pattern)
    with pytest.raises(ValueError, match="--must-not-match"):
        CleanOptions(must_not_match=pattern)


class Disk:
    """What a power cut would leave: which files' content and which folders' names have been put on disk."""

    def __init__(self, patch, folder: Path, links: bool = True):
        """links: whether the disk has hard links."""
        self.folder, self.synced, self.renamed, self.complaints = folder, {}, set(), []
        self.fsync, self.replace, self.link, self.links = os.fsync, os.replace, os.link, links
        for name in ("fsync", "replace", "link"):
            patch.setattr(os, name, getattr(self, "_" + name))

    def _fsync(self, descriptor):
        self.fsync(descriptor)
        status = os.fstat(descriptor)
        self.synced[status.st_ino] = (status.st_size, status.st_mtime_ns)
        self.renamed.discard(status.st_ino)

    def _replace(self, source, target):
        target = Path(target)
        if target.name in (MANIFEST, "progress.json"):
            self.complaints += [f"{target.name} before {name}" for name in self.lost(complete=target.name == MANIFEST)]
        self.replace(source, target)
        self.renamed.add(target.parent.stat().st_ino)

    def _link(self, source, target):
        self.renamed.add(Path(target).parent.stat().st_ino)
        if not self.links:
            raise OSError("another disk")
        self.link(source, target)

    def lost(self, complete: bool) -> list[str]:
        """Of the named files (when complete: all) those that are not on disk as they are, and folders whose names are not."""
        lost = []
        for path in [self.folder, *self.folder.rglob("*")]:
            status = path.stat()
            if path.is_dir():
                if status.st_ino in self.renamed or (complete and status.st_ino not in self.synced):
                    lost.append(path.name)
            elif path.name not in (".lock", "merge.partial") and (complete or path.suffix in (".tar", ".npy")):
                size = self.synced.get(status.st_ino, (None, None))
                if (
                    size != (status.st_size, status.st_mtime_ns)
                    and ".partial" not in path.name
                    and path.name != "progress.json"
                ):
                    lost.append(path.name)
        return lost


@pytest.mark.parametrize("links", [True, False])
def test_what_the_manifest_names_is_on_disk_before_it(inputs, tmp_path, monkeypatch, links):
    """Files, then folders, then the manifest, and its folder after it; the same for each note of progress."""
    monkeypatch.setattr("titans_pretrain.data_prep.tokenize.CHUNK_BYTES", 500)
    with monkeypatch.context() as patch:
        disk = Disk(patch, tmp_path / "a")
        options = TokenizeOptions(**SMALL, clean=CleanOptions(deduplicate=True))
        manifest = tokenize([str(inputs[0])], TOKENIZER, tmp_path / "a", options, checkpoint_seconds=0)
        assert len(manifest.splits["train"]) > 3
        assert disk.complaints == [] and disk.lost(complete=True) == []
    write_lines(tmp_path / "b.jsonl", ["new", "document 3 " + "xyz\n" * 3])
    tokenize([str(tmp_path / "b.jsonl")], TOKENIZER, tmp_path / "b", TokenizeOptions(0.0))
    known = {path.stat().st_ino: (path.stat().st_size, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.*")}
    for out, deduplicate in (("all", False), ("different", True)):  # without a document written anew, and with
        with monkeypatch.context() as patch:
            disk = Disk(patch, tmp_path / out, links)
            disk.synced = dict(known)
            merge([str(tmp_path / name) for name in "ab"], str(tmp_path / out), deduplicate=deduplicate)
            assert disk.complaints == [] and disk.lost(complete=True) == []


@pytest.mark.parametrize("call", [1, 4, 40])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(inputs, tmp_path, monkeypatch, call):
    monkeypatch.setattr("titans_pretrain.data_prep.tokenize.CHUNK_BYTES", 500)
    options, out, calls = TokenizeOptions(**SMALL), tmp_path / "data", Counter()
    tokenize([str(inputs[0])], TOKENIZER, tmp_path / "whole", options)
    original = os.fsync

    def full(descriptor):
        calls["fsync"] += 1
        if calls["fsync"] >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"cannot write to .*data: No space left") as told,
    ):
        patch.setattr(os, "fsync", full)
        tokenize([str(inputs[0])], TOKENIZER, out, options, checkpoint_seconds=0)
    assert "\n" not in str(told.value)
    tokenize([str(inputs[0])], TOKENIZER, out, options)
    assert hashes(out) == hashes(tmp_path / "whole")


def test_foreign_shards_are_not_overwritten(inputs, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-000000.tar").write_text("precious")
    with pytest.raises(ValueError, match="empty folder"):
        tokenize([str(inputs[0])], TOKENIZER, tmp_path / "data")


def test_deduplication_keeps_the_first(tmp_path):
    paths = write_lines(tmp_path / "a.jsonl", ["one", "two", "one", "three", "two", "one"])
    paths += write_lines(tmp_path / "b.jsonl", ["four", "three"])
    options = TokenizeOptions(validation=0.0, clean=CleanOptions(deduplicate=True))
    manifest = tokenize(paths, TOKENIZER, tmp_path / "data", options)
    assert texts_of(tmp_path / "data", "train") == ["one", "two", "three", "four"]
    assert manifest.source["dropped"] == {"duplicate": 4}
    assert manifest.source["documents_read"] == 8


@pytest.mark.parametrize(
    "clean, kept, reason",
    [
        (CleanOptions(min_characters=4), ["long enough", "12 34 !! ?? ** ##"], "too_short"),
        (CleanOptions(max_characters=12), ["abc", "long enough"], "too_long"),
        (CleanOptions(min_letters=0.7), ["abc", "long enough"], "few_letters"),
        (CleanOptions(must_match="[a-z]"), ["abc", "long enough"], "no_match"),
        (CleanOptions(must_not_match=r"\d{2}"), ["abc", "long enough"], "match"),
    ],
)
def test_filters(tmp_path, clean, kept, reason):
    paths = write_lines(tmp_path / "a.jsonl", ["abc", "long enough", "12 34 !! ?? ** ##"])
    options = TokenizeOptions(validation=0.0, clean=clean)
    manifest = tokenize(paths, TOKENIZER, tmp_path / "data", options)
    assert texts_of(tmp_path / "data", "train") == kept
    assert manifest.source["dropped"] == {reason: 3 - len(kept)}


def test_empty_documents_are_dropped(tmp_path):
    manifest = tokenize(write_lines(tmp_path / "a.jsonl", ["", "x"]), TOKENIZER, tmp_path / "d", TokenizeOptions(0.0))
    assert texts_of(tmp_path / "d", "train") == ["x"]
    assert manifest.source["dropped"] == {"too_short": 1}


def test_split_follows_the_text_alone(inputs, tmp_path):
    """The same document is on the same side in every corpus, whatever stands around it."""
    folder, texts = inputs
    tokenize([str(folder)], TOKENIZER, tmp_path / "all", TokenizeOptions(0.2))
    tokenize(write_lines(tmp_path / "r.jsonl", texts[::-2]), TOKENIZER, tmp_path / "half", TokenizeOptions(0.2))
    every, half = set(texts_of(tmp_path / "all", "validation")), set(texts_of(tmp_path / "half", "validation"))
    assert half == every & set(texts[::-2])
    tokenize([str(folder)], TOKENIZER, tmp_path / "less", TokenizeOptions(0.1))
    assert set(texts_of(tmp_path / "less", "validation")) < every


def test_bad_record_stops_with_its_place_or_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n{"text": "y"}\n')
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.jsonl, record 1: .*--skip-bad-records"):
        tokenize([str(tmp_path / "a.jsonl")], TOKENIZER, tmp_path / "d1", TokenizeOptions(0.0))
    with pytest.raises(ValueError, match=r"b\.txt, record 0: .*utf-8"):
        tokenize([str(tmp_path / "b.txt")], TOKENIZER, tmp_path / "d2", TokenizeOptions(0.0), workers=1)
    options = TokenizeOptions(0.0, clean=CleanOptions(skip_bad_records=True))
    manifest = tokenize([str(tmp_path / "*.jsonl"), str(tmp_path / "b.txt")], TOKENIZER, tmp_path / "d3", options)
    assert texts_of(tmp_path / "d3", "train") == ["x", "y"]
    assert manifest.source["dropped"] == {"bad_record": 2}


def test_a_document_larger_than_a_shard(tmp_path):
    texts = ["a", "b" * 50_000, "c"]
    paths = write_lines(tmp_path / "a.jsonl", texts)
    manifest = tokenize(paths, TOKENIZER, tmp_path / "d", TokenizeOptions(0.0, shard_size=10_000))
    assert texts_of(tmp_path / "d", "train") == texts
    assert [shard.documents for shard in manifest.splits["train"]] == [1, 1, 1]


def test_parts_share_files_by_bytes():
    files = [InputFile(str(i), str(i), size) for i, size in enumerate([100, 1, 1, 1, 100, 100, 50, 50])]
    ranges = [files_of_part(files, (i, 4)) for i in range(4)]
    assert [number for numbers, _ in ranges for number in numbers] == list(range(8))
    assert all(rest == (0, 1) for _, rest in ranges)
    assert max(sum(files[n].size for n in numbers) for numbers, _ in ranges) <= 150
    assert files_of_part(files[:2], (1, 4)) == (range(2), (1, 4))


def test_two_writers_do_not_mix(inputs, tmp_path):
    import fcntl

    (tmp_path / "data").mkdir()
    with open(tmp_path / "data" / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing"):
            tokenize([str(inputs[0])], TOKENIZER, tmp_path / "data")


def test_unreadable_tail_of_progress_is_cut(tmp_path):
    """What was written after a checkpoint disappears, in the tar and in the index."""
    writer = ShardWriter(tmp_path, "train", 1 << 20, 2)
    sample = tar_sample("a", np.arange(10, dtype="<u2"), {})
    writer.add(sample, 20)
    state = writer.checkpoint()
    for _ in range(5):
        writer.add(sample, 20)
    writer.checkpoint()
    again = ShardWriter(tmp_path, "train", 1 << 20, 2, state)
    again.add(tar_sample("b", np.arange(5, dtype="<u2"), {}), 10)
    (shard,) = again.finish()
    assert (shard.documents, shard.tokens) == (2, 15)
    with tarfile.open(tmp_path / shard.name) as tar:
        assert [m.name for m in tar] == ["a.tokens.bin", "a.json", "b.tokens.bin", "b.json"]


def test_long_names_and_metadata_fit(tmp_path):
    folder = tmp_path / ("d" * 200) / ("e" * 200)
    folder.mkdir(parents=True)
    (folder / "ü.txt").write_text("text")
    tokenize([str(tmp_path)], TOKENIZER, tmp_path / "data", TokenizeOptions(0.0, suffixes=(".txt",)))
    with tarfile.open(tmp_path / "data" / "train-000000.tar") as tar:
        (name,) = [member.name for member in tar if member.name.endswith("json")]
        assert re.fullmatch(r"\d{6}-\d{9}\.json", name)
        assert json.loads(tar.extractfile(name).read())["source"].endswith("ü.txt")


def test_a_file_name_that_is_no_text(tmp_path):
    """Linux takes any bytes as a name."""
    (tmp_path / "in").mkdir()
    (tmp_path / os.fsdecode(b"in/caf\xe9.txt")).write_text("text")
    tokenize([str(tmp_path / "in")], TOKENIZER, tmp_path / "data", TokenizeOptions(0.0))
    with tarfile.open(tmp_path / "data" / "train-000000.tar") as tar:
        metadata = json.loads(tar.extractfile("000000-000000000.json").read())
    assert metadata["source"] == "caf?.txt"
