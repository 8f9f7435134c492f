"""Files of a data folder wherever it lives: local disk, network mount, fsspec URL or a shell command.

    /data/corpus                          read in place
    s3://bucket/corpus, https://...       fsspec; each file is copied once into `cache_dir`
    pipe:ssh host cat /data/corpus/{}     the command's output, {} being the file's name; also copied into `cache_dir`

Every read is tried `ATTEMPTS` times with growing pauses; after that a `ShardError` names the file.
"""

import fcntl
import hashlib
import os
import random
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from titans_pretrain.data.manifest import ShardEntry

ATTEMPTS = 5
FIRST_PAUSE = 0.5  # seconds; doubled after each failure
INDEX_HEADER = 128  # bytes before the rows of an .idx.npy (NumPy format 1.0)


class ShardError(ValueError):
    """A file of the data folder stayed unreadable, or is not the file that the manifest describes."""


def with_retries(action, what: str, attempts: int | None = None):
    """Calls `action` until it stops raising OSError; then raises ShardError(`what`)."""
    attempts = attempts or ATTEMPTS
    for attempt in range(attempts):
        try:
            return action()
        except FileNotFoundError as error:
            raise ShardError(f"{what}: no such file") from error  # waiting does not bring it back
        except OSError as error:
            if attempt + 1 == attempts:
                raise ShardError(f"{what}: unreadable after {attempts} attempts ({error})") from error
            # jitter, or a thousand ranks come back to the same server at the same moment
            time.sleep(FIRST_PAUSE * 2**attempt * random.uniform(0.5, 1.0))


class Folder:
    """A data folder; `local(name)` gives a path on this machine, copied into the cache first if need be."""

    def __init__(self, path: str, cache_dir: str | None = None):
        self.path = path.rstrip("/") if len(path) > 1 else path
        self.is_command = path.startswith("pipe:")
        self.is_remote = self.is_command or "://" in path
        if self.is_command and "{}" not in path:
            raise ValueError(f"data path {path!r}: a pipe: command needs {{}} where the file's name goes")
        if self.is_remote and not cache_dir:
            raise ValueError(f"data path {path!r} is not on this machine: set data.cache_dir to a local folder")
        if self.is_remote:
            self._cache = Path(cache_dir).expanduser() / hashlib.sha256(self.path.encode()).hexdigest()[:16]

    def describe(self, name: str) -> str:
        return self.path.replace("{}", name) if self.is_command else f"{self.path}/{name}"

    def local(
        self, name: str, size: int | None = None, sha256: str | None = None, tag: str = "", fresh: bool = False
    ) -> Path:
        """Path of the file on this machine. Remote files are downloaded once per machine and `tag` (what tells versions
        of the file apart), and checked if size or sha256 is given; `fresh` downloads again. Raises ShardError."""
        if not self.is_remote:
            return Path(self.path) / name
        target = self._cache / f"{tag[:16]}{name}"
        if not fresh and target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        # the other ranks of this machine wait for one download
        with lock_file(target.with_name(target.name + ".lock")):
            if fresh or not target.exists():
                with_retries(lambda: self._download(name, target, size, sha256), self.describe(name))
        return target

    def read(self, name: str, fresh: bool = False) -> bytes:
        path = self.local(name, fresh=fresh)
        return with_retries(path.read_bytes, self.describe(name))

    def _download(self, name: str, target: Path, size: int | None, sha256: str | None) -> None:
        partial = target.with_name(f"{target.name}.{os.getpid()}.part")
        digest, count = hashlib.sha256(), 0
        try:
            with self._open(name) as source, open(partial, "wb") as out:
                while block := source.read(1 << 22):
                    out.write(block)
                    digest.update(block)
                    count += len(block)
            if size is not None and count != size:
                raise OSError(f"{count} bytes came, the manifest says {size}")
            if sha256 is not None and digest.hexdigest() != sha256:
                raise OSError("sha256 differs from the manifest's")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def _open(self, name: str):
        if not self.is_command:
            import fsspec

            try:
                with fsspec.open(self.describe(name), "rb") as file:
                    yield file
            except (ImportError, ValueError) as error:  # no driver for this protocol
                raise ValueError(f"data path {self.path!r}: {error}") from None
            return
        command = self.describe(name).removeprefix("pipe:")
        with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
            yield process.stdout
        if process.returncode:
            raise OSError(f"the command ended with exit status {process.returncode}")


@contextmanager
def lock_file(path: Path):
    """Holds an exclusive lock between processes; the kernel drops it when the process dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class TarFile:
    """Random reads from one open tar.

    pread and not a memory map: a disk error or a file cut short under a map kills the process with SIGBUS, here it is
    an OSError with the file's name; from the page cache both cost about a microsecond per document.
    """

    def __init__(self, path: Path, name: str, size: int):
        self._name = name
        self._fd = with_retries(lambda: os.open(path, os.O_RDONLY), name)
        actual = os.fstat(self._fd).st_size
        if actual != size:
            raise ShardError(f"{name} has {actual} bytes, the manifest says {size}; run `titans-data verify`")

    def __del__(self):
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills the bytes of `buffer` from `offset` on. Raises ShardError."""
        # the common case first, without a closure: this runs once per document
        try:
            if os.preadv(self._fd, [buffer], offset) == len(buffer):
                return
        except OSError:
            pass
        with_retries(lambda: self._read_all(buffer, offset), self._name)

    def _read_all(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):  # one call returns at most 2 GiB
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if count == 0:
                raise OSError(f"ends at byte {offset + done}, inside a document")
            done += count


def open_tar(folder: Folder, shard: ShardEntry) -> TarFile:
    path = folder.local(shard.name, shard.bytes, shard.sha256, tag=shard.sha256)
    return TarFile(path, folder.describe(shard.name), shard.bytes)


def load_index(folder: Folder, shard: ShardEntry) -> np.ndarray:
    """The (offset, size) table of a shard, int64 [documents, 2]. Raises ShardError."""
    name, documents = shard.index_name, shard.documents
    size = INDEX_HEADER + 16 * documents
    content = with_retries(folder.local(name, size, tag=shard.sha256).read_bytes, folder.describe(name))
    # Not np.load: it parses the header with `ast`, which is not thread-safe in Python 3.11.
    if len(content) != size or not content.startswith(b"\x93NUMPY") or b"'<i8'" not in content[:INDEX_HEADER]:
        raise ShardError(f"{folder.describe(name)} is no int64 table of {documents} documents, as the manifest says")
    return np.frombuffer(content, "<i8", offset=INDEX_HEADER).reshape(documents, 2)
