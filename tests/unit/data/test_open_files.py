"""Any number of shards with a bounded number of open files; what this machine lacks is never a bad shard."""

import errno
import os
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from corpora import make_config, write_corpus

from titans_pretrain.data import ShardError, build_reader, shards
from titans_pretrain.data.manifest import ShardEntry
from titans_pretrain.data.shards import TarFile, load_index
from titans_pretrain.data.storage import Folder
from titans_pretrain.data_prep.shards import save_index


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("titans_pretrain.data.storage.FIRST_PAUSE", 0.001)


@pytest.fixture
def mixture(tmp_path):
    for i in range(3):
        write_corpus(tmp_path / f"c{i}", [60] * 30, shard_size=2048, seed=i)
    return {str(tmp_path / f"c{i}"): 1.0 for i in range(3)}


def tokens_of(config, most=None):
    rows = []
    for batch in build_reader(config, epochs=1):
        rows.append(batch.tokens)
        assert most is None or len(TarFile._open) <= most
    return torch.cat(rows)


def test_open_files_are_bounded_for_any_number_of_corpora(mixture, monkeypatch):
    expected = tokens_of(make_config(mixture=mixture))
    monkeypatch.setattr(shards.resource, "getrlimit", lambda _: (16, 16))
    assert torch.equal(tokens_of(make_config(mixture=mixture), most=8), expected)


def test_files_of_a_reader_that_is_gone_are_closed(mixture):
    before = len(TarFile._open)
    reader = build_reader(make_config(mixture=mixture), epochs=1)
    opened = [next(reader) for _ in range(20)]
    assert len(TarFile._open) > before and opened
    reader._background.submit(int).result()
    del reader
    import gc

    gc.collect()
    assert len(TarFile._open) == before


@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_too_many_open_files_is_never_a_bad_shard(mixture, monkeypatch, mode, number):
    reader = build_reader(make_config(mixture=mixture, on_bad_shard=mode))

    def full(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shards.os, "open", full)
    with pytest.raises(ValueError, match=os.strerror(number)) as e:
        next(reader)
    assert not isinstance(e.value, ShardError) and not reader.skipped


def test_room_is_made_when_there_were_too_many_after_all(mixture, monkeypatch):
    expected = tokens_of(make_config(mixture=mixture))
    original, most = os.open, 10

    def limited(path, *flags):
        if str(path).endswith(".tar") and len(TarFile._open) >= most:
            raise OSError(errno.EMFILE, "Too many open files")
        return original(path, *flags)

    monkeypatch.setattr(shards.os, "open", limited)
    assert torch.equal(tokens_of(make_config(mixture=mixture)), expected)


def test_a_full_cache_is_never_a_bad_shard(tmp_path, monkeypatch):
    write_corpus(tmp_path / "c", [60] * 24)
    config = make_config(f"pipe:cat {tmp_path}/c/{{}}", cache_dir=str(tmp_path / "cache"), on_bad_shard="skip")
    reader, original = build_reader(config), Folder._open

    @contextmanager
    def full(self, name):
        with original(self, name):
            raise OSError(errno.ENOSPC, "No space left on device")
            yield

    monkeypatch.setattr(Folder, "_open", full)
    with pytest.raises(ValueError, match=r"No space left on device; make room in data\.cache_dir"):
        next(reader)
    assert not reader.skipped


def test_a_tar_replaced_while_it_is_read_is_named(mixture, monkeypatch):
    """One that was closed in between must not be opened as another file."""
    monkeypatch.setattr(shards.resource, "getrlimit", lambda _: (4, 4))
    monkeypatch.setattr("titans_pretrain.data.reader.SLOW", 0.0)  # one batch ahead, always
    (path, *_) = mixture
    reader = build_reader(make_config(path))
    next(reader)
    reader._ahead[1].result()
    for tar in list(Path(path).glob("*.tar")):
        other = tar.with_suffix(".new")
        other.write_bytes(tar.read_bytes()[::-1])
        other.rename(tar)
    with pytest.raises(ShardError, match="replaced or changed"):
        for _ in range(10):
            next(reader)


def test_threads_read_while_others_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.resource, "getrlimit", lambda _: (4, 4))
    files = []
    for i in range(8):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 1000)
        files.append(TarFile(tmp_path / f"{i}", f"{i}", 1000))
    wrong = []

    def read(seed: int):
        buffer = bytearray(100)
        for j in range(400):
            i = (j * 5 + seed) % 8
            files[i].read_into(memoryview(buffer), 500)
            if bytes(buffer) != bytes([i]) * 100:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(TarFile._open) <= 2


@pytest.mark.parametrize("row", [[-512, 20], [512, -20], [512, 21], [4096, 20], [1 << 62, 1 << 62], [512, 0]], ids=str)
def test_an_index_that_points_outside_its_tar_is_a_bad_shard(tmp_path, row):
    import numpy as np

    good = [[512, 20], [1536, 40]]
    shard = ShardEntry("train-000000.tar", 2, 30, 4096, "0" * 64)
    save_index(tmp_path / shard.index_name, np.array(good))
    assert load_index(Folder(str(tmp_path)), shard).tolist() == good
    save_index(tmp_path / shard.index_name, np.array([row, good[1]]))
    with pytest.raises(ShardError, match="does not describe 30 tokens"):
        load_index(Folder(str(tmp_path)), shard)
