"""Reading the shards of a data folder: index tables, and random reads from any number of tars with a bounded number open."""

import os
import resource
import threading
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import numpy as np

from titans_pretrain.data.manifest import ShardEntry
from titans_pretrain.data.storage import Folder, ShardError, with_retries

INDEX_HEADER = 128  # bytes before the rows of an .idx.npy (NumPy format 1.0)


class _Descriptor:
    """An open file; closed when nobody uses it any more, so that one thread cannot close it under another."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


class TarFile:
    """Random reads from one tar, opened when it is read and closed again when others are read.

    pread and not a memory map: a disk error or a file cut short under a map kills the process with SIGBUS, here it is
    an OSError with the file's name; from the page cache both cost about a microsecond per document.
    """

    _open: ClassVar[OrderedDict[int, _Descriptor]] = (
        OrderedDict()
    )  # of all tars of this process, by id; the last used last
    _lock = threading.RLock()  # reentrant: the garbage collector may call __del__ anywhere

    def __init__(self, path: Path, name: str, size: int):
        self._path, self._name = path, name
        found = with_retries(path.stat, name)
        if found.st_size != size:
            raise ShardError(f"{name} has {found.st_size} bytes, the manifest says {size}; run `titans-data verify`")
        self._identity = _identity(found)

    def __del__(self):
        with self._lock:
            self._open.pop(id(self), None)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills the bytes of `buffer` from `offset` on. Raises ShardError."""
        # the common case first, without a closure: this runs once per document
        try:
            descriptor = self._descriptor()  # held until the read is over, see _Descriptor
            if os.preadv(descriptor.number, [buffer], offset) == len(buffer):
                return
        except OSError:
            pass
        with_retries(lambda: self._read_all(buffer, offset), self._name)

    def _read_all(self, buffer: memoryview, offset: int) -> None:
        done, descriptor = 0, self._descriptor()
        while done < len(buffer):  # one call returns at most 2 GiB
            count = os.preadv(descriptor.number, [buffer[done:]], offset + done)
            if count == 0:
                raise OSError(f"ends at byte {offset + done}, inside a document")
            done += count

    def _descriptor(self) -> _Descriptor:
        files = self._open
        with self._lock:
            if (found := files.get(id(self))) is not None:
                files.move_to_end(id(self))
                return found
            # half of what the process may open: the rest is for sockets, other libraries, and files being downloaded
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
            while files and len(files) >= limit:
                files.popitem(last=False)
            try:
                found = _Descriptor(self._path)
            except OSError:
                for _ in range(len(files) // 2):  # if there were too many after all, the next attempt finds room
                    files.popitem(last=False)
                raise
            if _identity(os.fstat(found.number)) != self._identity:
                raise ShardError(f"{self._name} was replaced or changed while it was being read")
            files[id(self)] = found
            return found


def _identity(found: os.stat_result) -> tuple:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def open_tar(folder: Folder, shard: ShardEntry) -> TarFile:
    path = folder.local(shard.name, shard.bytes, shard.sha256, tag=shard.sha256)
    return TarFile(path, folder.describe(shard.name), shard.bytes)


def load_index(folder: Folder, shard: ShardEntry) -> np.ndarray:
    """The (offset, size) table of a shard, int64 [documents, 2], bytes. Raises ShardError."""
    name, documents = shard.index_name, shard.documents
    size = INDEX_HEADER + 16 * documents
    content = with_retries(folder.local(name, size, tag=shard.sha256).read_bytes, folder.describe(name))
    # Not np.load: it parses the header with `ast`, which is not thread-safe in Python 3.11.
    if len(content) != size or not content.startswith(b"\x93NUMPY") or b"'<i8'" not in content[:INDEX_HEADER]:
        raise ShardError(f"{folder.describe(name)} is no int64 table of {documents} documents, as the manifest says")
    table = np.frombuffer(content, "<i8", offset=INDEX_HEADER).reshape(documents, 2)
    offset, size = table.T
    item = int(size.sum()) // max(shard.tokens, 1)
    if (
        ((offset < 0) | (size < 0) | (size > shard.bytes - offset) | (size % max(item, 1) != 0)).any()
        or int(size.sum()) != item * shard.tokens
        or (item not in (2, 4) and shard.tokens)
    ):
        raise ShardError(f"{folder.describe(name)} does not describe {shard.tokens} tokens in {shard.bytes} bytes")
    return table
