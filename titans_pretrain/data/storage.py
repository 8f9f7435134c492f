"""Files of a data folder wherever it lives: local disk, network mount, fsspec URL or a shell command.

    /data/corpus                          read in place
    s3://bucket/corpus, https://...       fsspec; each file is copied once into `cache_dir`
    pipe:ssh host cat /data/corpus/{}     the command's output, {} being the file's name; also copied into `cache_dir`

Every read is tried `ATTEMPTS` times with growing pauses; after that a `ShardError` names the file.
"""

import errno
import fcntl
import hashlib
import os
import random
import shlex
import signal
import subprocess
import threading
import time
import weakref
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from pathlib import Path

ATTEMPTS = 5
FIRST_PAUSE = 0.5  # seconds; doubled after each failure
STALE = 3600.0  # seconds without a byte after which nobody writes a partial file any more
# What this process or machine lacks: no shard is bad because of it, and none may be skipped for it
_OURS = {
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "raise the system's fs.file-max",
    errno.ENOMEM: "free some memory",
    errno.ENOSPC: "make room in {}",
    errno.EDQUOT: "make room in {}",
    errno.EROFS: "choose another place than {}, which cannot be written",
}


class ShardError(ValueError):
    """A file of the data folder stayed unreadable, or is not the file that the manifest describes."""


def with_retries(action, what: str, attempts: int | None = None, folder: str = "data.cache_dir"):
    """Calls `action` until it stops raising OSError; then raises ShardError(`what`), or ValueError where this machine is at fault.
    folder: where it writes."""
    attempts = attempts or ATTEMPTS
    for attempt in range(attempts):
        try:
            return action()
        except FileNotFoundError as error:
            raise ShardError(f"{what}: no such file") from error  # waiting does not bring it back
        except OSError as error:
            if attempt + 1 == attempts:
                if error.errno in _OURS:
                    raise ValueError(f"{what}: {error.strerror}; {_OURS[error.errno].format(folder)}") from error
                raise ShardError(f"{what}: failed {attempts} times ({error})") from error
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
        self._closed = threading.Event()
        self._partial: set[Path] = set()
        self._commands: set[subprocess.Popen] = set()
        # at the process' end at the latest: its threads just stop there
        self._give_up = weakref.finalize(self, _give_up, self._closed, self._partial, self._commands)

    def close(self) -> None:
        """Gives up, and removes, what other threads are downloading. No file can be downloaded any more."""
        self._give_up()

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
        for left in target.parent.glob(f"{target.name}.*.part"):  # of a process that was killed
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink(missing_ok=True)
        partial = target.with_name(f"{target.name}.{os.uname().nodename}-{os.getpid()}.part")
        self._partial.add(partial)
        digest, count = hashlib.sha256(), 0
        try:
            with self._open(name) as source, open(partial, "wb") as out:
                while block := source.read(1 << 22):
                    if self._closed.is_set():
                        raise CancelledError
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
            self._partial.discard(partial)

    @contextmanager
    def _open(self, name: str):
        if self._closed.is_set():
            raise CancelledError
        if not self.is_command:
            import fsspec

            try:
                with fsspec.open(self.describe(name), "rb") as file:
                    yield file
            except (ImportError, ValueError) as error:  # no driver for this protocol
                raise ValueError(f"data path {self.path!r}: {error}") from None
            return
        command = self.describe(shlex.quote(name)).removeprefix("pipe:")
        # a session of its own, so that all that the command started can be ended with it
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
        self._commands.add(process)
        try:
            with process:
                try:
                    yield process.stdout
                except BaseException:
                    _kill(process)
                    raise
        finally:
            self._commands.discard(process)
        if process.returncode:
            raise OSError(f"the command ended with exit status {process.returncode}")


def _give_up(closed: threading.Event, partial: set[Path], commands: set[subprocess.Popen]) -> None:
    closed.set()
    for process in list(commands):
        _kill(process)
    for path in list(partial):
        path.unlink(missing_ok=True)


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def lock_file(path: Path):
    """Holds an exclusive lock between processes; the kernel drops it when the process dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
