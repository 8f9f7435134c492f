"""One process group at a time trains in a run folder: RUN/lock names who does.

The file holds its owner's host, pid and what tells that process from a later one with the same pid; its time of change is a sign
of life, renewed every BEAT seconds. The owner is gone, and the lock taken over, when

- it ran on this machine (the same boot and the same processes are seen), and no such process is there: at once;
- it ran elsewhere (a requeued job may start on another node) and left no sign of life for GONE_AFTER seconds. Ages are taken by
  the clock of the file system, since those of two hosts may differ; a younger lock is watched until it is renewed or old.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LOCK = "lock"
BEAT, GONE_AFTER, PAUSE = 10.0, 60.0, 1.0  # seconds; PAUSE: between two looks at a lock


class RunLock:
    """Inside `with` this process owns `run_dir`, which is made if it is not there. Raises ValueError, naming host and pid,
    while another one does."""

    def __init__(self, run_dir: Path):
        self._folder, self._path = run_dir, run_dir / LOCK
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "process": _process(os.getpid())}
        self._stop = threading.Event()
        self._made = False

    def __enter__(self) -> "RunLock":
        self._made = not self._folder.exists()
        self._folder.mkdir(parents=True, exist_ok=True)
        while not self._try():
            pass
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if _read(self._path)[0] == self._me:
                self._path.unlink()
            if self._made:
                self._folder.rmdir()  # only if nothing came into it

    def _try(self) -> bool:
        """Takes the lock if it is free; removes that of an owner that is gone; whether it is now ours."""
        owner, changed = _read(self._path)
        if owner is None:
            with (
                contextlib.suppress(FileExistsError),
                open(self._path, "x") as file,
            ):  # in one move: one process succeeds
                file.write(json.dumps(self._me))
                return True
            return False
        self._wait_until_gone(owner, changed)
        with _alone(self._folder):
            if _read(self._path) == (owner, changed):
                self._path.unlink()
                print(f"takes over {self._path}: {_name(owner)} is gone", flush=True)
        return False

    def _wait_until_gone(self, owner: dict, changed: float) -> None:
        if _same_machine(owner.get("process"), self._me["process"]):
            if _process(owner.get("pid")) == owner["process"]:
                raise self._refusal(owner)
            return
        told = False
        while self._clock() - changed <= GONE_AFTER:
            found = _read(self._path)
            if found[0] is None:
                return
            if found != (owner, changed):
                raise self._refusal(found[0])
            if not told:
                print(
                    f"{self._path} is of {_name(owner)}: waits up to {GONE_AFTER:.0f} s for a sign of life", flush=True
                )
                told = True
            time.sleep(PAUSE)

    def _refusal(self, owner: dict) -> ValueError:
        return ValueError(
            f"{_name(owner)} trains in {self._folder}; wait for it, stop it, or choose another run.dir (if it is gone for "
            f"certain, remove {self._path})"
        )

    def _clock(self) -> float:
        """Now, as the file system of the run folder has it."""
        probe = self._path.with_name(f".writing-clock-{self._me['host']}-{os.getpid()}")
        descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY)
        try:
            os.utime(descriptor)
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        told = False
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):  # a file system that does not answer for a while
                owner, _ = _read(self._path)
                if owner is None and not told:
                    print(
                        f"warning: {self._path} is gone; has its disk been unmounted, or the run folder moved?",
                        file=sys.stderr,
                        flush=True,
                    )
                told = owner is None
                if owner is not None and owner != self._me:
                    print(
                        f"error: {_name(owner)} has taken over {self._path}; this one ends without a checkpoint",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)
                os.utime(self._path)


def _read(path: Path) -> tuple[dict | None, float]:
    """Who owns a lock and when it last showed a sign of life; None: there is no lock. {}: one that nobody can read."""
    try:
        with open(path, "rb") as file:  # opened anew: NFS keeps what it knows of a file for a while
            changed, content = os.fstat(file.fileno()).st_mtime, file.read()
    except FileNotFoundError:
        return None, 0.0
    try:
        owner = json.loads(content)
    except ValueError:
        owner = {}
    return owner if isinstance(owner, dict) else {}, changed


def _name(owner: dict) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}"


def _process(pid) -> list | None:
    """What tells a process from every other one: the boot, the name space of its pid, and when it started; None if there is no
    such process, or no /proc."""
    with contextlib.suppress(OSError, IndexError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state in "ZX":  # killed, and not yet waited for
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [boot, os.readlink("/proc/self/ns/pid"), rest[18]]
    return None


def _same_machine(a: list | None, b: list | None) -> bool:
    return isinstance(a, list) and isinstance(b, list) and a[:2] == b[:2]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time, where the file system can. Elsewhere two might take over one lock within the same
    moment: at its next sign of life the first of them sees it, and ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
