"""Writes shards: WebDataset tars that append, survive a kill, and do not depend on when or where they were written."""

import hashlib
import json
import os
import tarfile
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from titans_pretrain.data.manifest import ShardEntry
from titans_pretrain.disk import sync

BLOCK = tarfile.BLOCKSIZE
TOKENS, METADATA = "tokens.bin", "json"


def tar_member(name: str, content: bytes) -> bytes:
    """One file as it stands in a tar: header, content, padding. mtime 0 and no owner, so equal content gives equal bytes."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    return header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)


def tar_sample(key: str, tokens: np.ndarray, metadata: dict) -> bytes:
    """A document: its tokens, which begin BLOCK bytes into the result, and its metadata."""
    return tar_member(f"{key}.{TOKENS}", tokens.tobytes()) + tar_member(
        f"{key}.{METADATA}", json.dumps(metadata, ensure_ascii=False).encode(errors="replace")
    )


def read_metadata(tar: BinaryIO, offset: int, size: int) -> dict:
    """The metadata of the document whose tokens are `size` bytes at `offset`: it is the next member."""
    tar.seek(offset + size + -size % BLOCK)
    header = tarfile.TarInfo.frombuf(tar.read(BLOCK), "utf-8", "strict")
    return json.loads(tar.read(header.size))


class ShardWriter:
    """The shards of one split.

    The open shard is `SPLIT.partial.tar`; a shard gets its name when it is complete, index first. `checkpoint()` is what
    a run needs to go on from this moment: give it to the constructor, and all that was written later is cut away.
    """

    def __init__(self, folder: Path, split: str, shard_size: int, item_size: int, state: dict | None = None):
        state = state or {"shards": [], "bytes": 0, "rows": 0, "tokens": 0}
        self._folder, self._split = folder, split
        self._shard_size, self._item_size = shard_size, item_size
        self.shards = [ShardEntry(**shard) for shard in state["shards"]]
        self._bytes, self._rows, self._tokens = state["bytes"], state["rows"], state["tokens"]
        self._partial, self._partial_index = folder / f"{split}.partial.tar", folder / f"{split}.partial.idx"
        self._reopen_named_shard()
        self._tar = _open_at(self._partial, self._bytes)
        self._index = _open_at(self._partial_index, 16 * self._rows)

    def _reopen_named_shard(self) -> None:
        """After a kill: the shard that was open at the checkpoint may have got its name since, and others after it."""
        known = {shard.name for shard in self.shards}
        for path in sorted(self._folder.glob(f"{self._split}-*.tar")):
            index = path.with_name(path.name + ".idx.npy")
            if path.name == self._name():
                np.load(index)[: self._rows].tofile(self._partial_index)
                os.replace(path, self._partial)
            elif path.name not in known:
                path.unlink()
            if path.name not in known:
                index.unlink()

    def _name(self) -> str:
        return f"{self._split}-{len(self.shards):06d}.tar"

    def add(self, sample: bytes | memoryview, token_bytes: int) -> None:
        """Appends what `tar_sample` made; a shard closes before it would exceed its size."""
        if self._rows and self._bytes + len(sample) > self._shard_size:
            self._close_shard()
        self._index.write(np.array([self._bytes + BLOCK, token_bytes], "<i8").tobytes())
        self._tar.write(sample)
        self._bytes += len(sample)
        self._rows += 1
        self._tokens += token_bytes // self._item_size

    @property
    def total_tokens(self) -> int:
        return self._tokens + sum(shard.tokens for shard in self.shards)

    def checkpoint(self) -> dict:
        """Puts everything on disk and returns the state to go on from (JSON-able)."""
        for file in (self._tar, self._index):
            file.flush()
            os.fsync(file.fileno())
        shards = [vars(shard) for shard in self.shards]
        return {"shards": shards, "bytes": self._bytes, "rows": self._rows, "tokens": self._tokens}

    def finish(self) -> list[ShardEntry]:
        """Closes the last shard and returns all."""
        if self._rows:
            self._close_shard()
        self.close()
        for path in (self._partial, self._partial_index):
            path.unlink()
        return self.shards

    def close(self) -> None:
        with self._tar, self._index:  # the second also if the first cannot be
            pass

    def _close_shard(self) -> None:
        name = self._name()
        self._tar.write(bytes(2 * BLOCK))  # the end mark of a tar
        self._tar.close()
        self._index.close()
        sync(self._partial)
        index = np.fromfile(self._partial_index, "<i8").reshape(-1, 2)
        save_index(self._folder / (name + ".idx.npy"), index)
        size, digest = self._bytes + 2 * BLOCK, sha256_of(self._partial)
        os.replace(self._partial, self._folder / name)
        sync(self._folder)  # before the index of the open shard begins anew
        self.shards.append(ShardEntry(name, self._rows, self._tokens, size, digest))
        self._tar, self._index = _open_at(self._partial, 0), _open_at(self._partial_index, 0)
        self._bytes = self._rows = self._tokens = 0


def save_index(path: Path, index: np.ndarray) -> None:
    with _replaced(path) as file:
        np.save(file, index)


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole, so that no reader ever sees half of it; on disk after all that stands beside it."""
    sync(path.parent)
    with _replaced(path) as file:
        file.write(text.encode())


@contextmanager
def _replaced(path: Path):
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


@contextmanager
def writing(folder: str | Path):
    """A disk that is full, broken or read-only becomes a ValueError."""
    try:
        yield
    except OSError as error:
        file = f" ({error.filename})" if error.filename not in (None, str(folder)) else ""
        told = f"cannot write to {folder}: {error.strerror or error}{file}; mend that and give the same command again"
        raise ValueError(told) from error


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_at(path: Path, size: int):
    file = open(path, "r+b" if path.exists() else "w+b", buffering=1 << 20)  # noqa: SIM115, the writer closes it
    if os.fstat(file.fileno()).st_size < size:
        raise ValueError(f"{path} is shorter than the run noted; remove its folder and start again")
    file.truncate(size)
    file.seek(size)
    return file
