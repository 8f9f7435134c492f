"""Remote folders: cached, checked, retried, and named when they fail."""

import threading
from typing import ClassVar

import fsspec
import pytest
import torch
from corpora import edit_manifest, make_config, write_corpus
from fsspec.implementations.memory import MemoryFileSystem

from titans_pretrain.data import ShardError, build_reader
from titans_pretrain.data.storage import Folder, with_retries


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("titans_pretrain.data.storage.FIRST_PAUSE", 0.001)


class FlakyFileSystem(MemoryFileSystem):
    """Fails the first `failures` times that a file whose name contains `victim` is opened; counts all openings."""

    protocol = "flaky"
    victim, failures = "", 0
    opened: ClassVar[dict[str, int]] = {}
    lock = threading.Lock()
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def _open(self, path, *args, **kwargs):
        cls = FlakyFileSystem
        with cls.lock:
            cls.opened[path] = cls.opened.get(path, 0) + 1
            if cls.victim and cls.victim in path and cls.opened[path] <= cls.failures:
                raise OSError("connection reset")
        return super()._open(path, *args, **kwargs)


@pytest.fixture
def remote(tmp_path):
    """A corpus on a flaky server, and its local original."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.victim, FlakyFileSystem.failures, FlakyFileSystem.opened = "", 0, {}
    write_corpus(tmp_path / "corpus", [60] * 24)
    system = FlakyFileSystem()
    system.put(str(tmp_path / "corpus"), "/bucket/corpus", recursive=True)
    FlakyFileSystem.opened = {}
    yield "flaky://bucket/corpus", tmp_path / "corpus", tmp_path / "cache"
    system.rm("/bucket", recursive=True)


def tokens_of(config):
    return torch.cat([batch.tokens for batch in build_reader(config, epochs=1)])


def test_remote_reads_as_local_and_is_downloaded_once(remote):
    url, local, cache = remote
    expected = tokens_of(make_config(local))
    assert torch.equal(tokens_of(make_config(url, cache_dir=str(cache))), expected)
    tars = {path: count for path, count in FlakyFileSystem.opened.items() if path.endswith(".tar")}
    assert len(tars) > 3 and set(tars.values()) == {1}
    assert torch.equal(tokens_of(make_config(url, cache_dir=str(cache))), expected)
    assert tars == {path: count for path, count in FlakyFileSystem.opened.items() if path.endswith(".tar")}


def test_pipe_command(remote, tmp_path):
    _, local, cache = remote
    config = make_config(f"pipe:cat '{local}/'{{}}", cache_dir=str(cache))
    assert torch.equal(tokens_of(config), tokens_of(make_config(local)))
    with pytest.raises(ValueError, match="exit status"):
        build_reader(make_config(f"pipe:cat {tmp_path}/none/{{}} 2>/dev/null", cache_dir=str(cache)))
    with pytest.raises(ValueError, match="needs {}"):
        build_reader(make_config("pipe:cat x", cache_dir=str(cache)))


def test_remote_needs_a_cache(remote):
    with pytest.raises(ValueError, match="cache_dir"):
        build_reader(make_config(remote[0]))


def test_unknown_protocol(tmp_path):
    with pytest.raises(ValueError, match="nosuch"):
        build_reader(make_config("nosuch://x", cache_dir=str(tmp_path)))


def test_short_failures_are_retried(remote):
    url, local, cache = remote
    FlakyFileSystem.victim, FlakyFileSystem.failures = "train-000002.tar", 3
    assert torch.equal(tokens_of(make_config(url, cache_dir=str(cache))), tokens_of(make_config(local)))


def test_lasting_failure_stops_with_the_name_or_skips(remote):
    url, _, cache = remote
    FlakyFileSystem.victim, FlakyFileSystem.failures = "train-000002.tar", 10**9
    with pytest.raises(ShardError, match=r"train-000002\.tar.*failed 5 times.*connection reset"):
        next(build_reader(make_config(url, cache_dir=str(cache))))
    reader = build_reader(make_config(url, cache_dir=str(cache), on_bad_shard="skip"))
    next(reader)
    assert list(reader.skipped) == ["train-000002.tar"]


def test_downloads_are_checked(remote):
    url, _, cache = remote
    system = FlakyFileSystem()
    path = "/bucket/corpus/train-000001.tar"
    content = bytearray(system.cat(path))
    content[600] ^= 1
    system.pipe(path, bytes(content))
    with pytest.raises(ShardError, match=r"train-000001\.tar.*sha256"):
        next(build_reader(make_config(url, cache_dir=str(cache))))
    system.pipe(path, bytes(content[:-1]))
    with pytest.raises(ShardError, match=r"train-000001\.tar.*bytes came"):
        next(build_reader(make_config(url, cache_dir=str(cache))))
    assert not list(cache.rglob("*.part"))


def test_cache_tells_versions_of_a_corpus_apart(remote):
    """A corpus that was replaced by another of the same shape: nothing of the old one may be read."""
    url, local, cache = remote
    tokens_of(make_config(url, cache_dir=str(cache)))
    write_corpus(local, [60] * 24, seed=5)
    FlakyFileSystem().put(f"{local}/", "/bucket/corpus/", recursive=True)
    assert torch.equal(tokens_of(make_config(url, cache_dir=str(cache))), tokens_of(make_config(local)))


def test_manifest_is_never_taken_from_the_cache(remote):
    url, local, cache = remote
    build_reader(make_config(url, cache_dir=str(cache)))
    edit_manifest(local, lambda document: document["source"].update(note=1))
    FlakyFileSystem().put(str(local / "manifest.json"), "/bucket/corpus/manifest.json")
    assert build_reader(make_config(url, cache_dir=str(cache)))._sources[0].manifest.source == {"note": 1}


def test_concurrent_ranks_share_one_download(remote):
    url, _, cache = remote
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(tokens_of(make_config(url, cache_dir=str(cache)))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, results[0]) for result in results)
    assert {count for path, count in FlakyFileSystem.opened.items() if path.endswith(".tar")} == {1}


def test_retries_pause_longer_and_longer(monkeypatch):
    pauses = []
    monkeypatch.setattr("titans_pretrain.data.storage.time.sleep", pauses.append)
    monkeypatch.setattr("titans_pretrain.data.storage.random.uniform", lambda low, high: high)

    def fail():
        raise OSError("down")

    with pytest.raises(ShardError, match="thing: failed 5 times"):
        with_retries(fail, "thing")
    assert pauses == [0.001, 0.002, 0.004, 0.008]


def test_absent_file_is_not_retried(tmp_path, monkeypatch):
    monkeypatch.setattr("titans_pretrain.data.storage.time.sleep", lambda _: pytest.fail("waited for a missing file"))
    with pytest.raises(ShardError, match="no such file"):
        Folder(str(tmp_path)).read("manifest.json")
