"""Copies of a run's checkpoints in `train.checkpoint_store`, made while training goes on."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from titans_pretrain.checkpoint import checkpoints, latest_checkpoint
from titans_pretrain.checkpoint.checksums import SUMS
from titans_pretrain.checkpoint.remote import RemoteStore
from titans_pretrain.checkpoint.store import hold, release, step_of, superseded_checkpoints
from titans_pretrain.checkpoint.together import from_all, rank, wait_for_first
from titans_pretrain.config.schema import TrainConfig
from titans_pretrain.data.background import Background
from titans_pretrain.training.events import FILE as EVENTS
from titans_pretrain.training.events import log_event
from titans_pretrain.training.hooks import Hook

log = logging.getLogger(__name__)
NOT_COPIED_EXIT_CODE = 87  # all steps are done and saved, and the store lacks the last checkpoint
RUN_FILES = ("metrics.jsonl", EVENTS, "wandb-id")  # what a run folder on another disk goes on with
_BESIDE = (*RUN_FILES, "config.yaml", "tokenizer/*")  # what makes a copy of the store a run folder
PATIENCE = 60  # seconds that a run waits for its upload after a signal: Slurm does not wait much longer


class Mirror(Hook):
    """The process that finishes checkpoints copies each of them when it is whole; the run folder stays what a run goes on from.

    One checkpoint is copied at a time, and stays on disk until it is. Where the store is slower than checkpoints come, the newest is
    next, and those between are copied after it if the policy still keeps them. The same policy holds in the store. What fails is a
    warning, and is tried again with the next checkpoint, at the next start too.

    stopped: whether a signal asked this process to end."""

    missing: str | None = None  # after a run: why the store lacks its last checkpoint, on all processes

    def __init__(self, train: TrainConfig, run_dir: Path, stopped: Callable[[], bool]):
        self._train, self._run_dir, self._stopped = train, run_dir, stopped
        self._store = RemoteStore(train.checkpoint_store)
        self._thread = Background()
        self._lock = threading.Lock()
        self._next: Path | None = None  # to be copied, as soon as the one before is
        self._copying: Path | None = None
        self._work: Future | None = None
        self._copied: str | None = None  # the newest that the store has
        self._failure: str | None = None  # of the last copy
        self._known: dict[str, bytes] = {}  # checkpoints in the store, and their SHA256SUMS

    def start(self) -> None:
        """Copies what an earlier process did not come to."""
        if rank() == 0 and (newest := latest_checkpoint(self._run_dir)) is not None:
            self._ask(newest)

    def after_save(self, trainer, checkpoint: Path) -> None:
        if rank() == 0:
            self._ask(checkpoint)

    def after_run(self, trainer) -> None:
        """Waits for the upload; not for long if a signal asks to end."""
        ended = wait_for_first(self._work, self._stopped, PATIENCE)
        why = self._failure if ended else f"it was not copied to {self._store.url} within {PATIENCE} s"
        lacks = self._work is not None and self._copied != trainer.saved.name
        self.missing = from_all(f"{trainer.saved} is on disk, but {why}" if lacks else None)[0]

    def _ask(self, checkpoint: Path) -> None:
        hold(checkpoint)
        with self._lock:
            left_out, self._next = self._next, checkpoint
            if self._copying is not None:
                log.warning(
                    "%s is still being copied to %s; next is %s", self._copying.name, self._store.url, checkpoint.name
                )
        if left_out not in (None, checkpoint):
            release(left_out)
        self._work = self._thread.submit(self._copy_next)

    def _copy_next(self) -> None:
        with self._lock:
            checkpoint, self._next = self._next, None
            self._copying = checkpoint
        if checkpoint is None:
            return
        try:
            self._copy(checkpoint)
        except Exception as e:  # whatever a driver says: the checkpoint is on disk, and training goes on
            self._failure = f"{self._store.url} did not take it: {' '.join(str(e).split()) or type(e).__name__}"
            told = "%s is on disk, but %s; training goes on, and it is tried again with the next"
            if self._copied == checkpoint.name:
                told = "%s is copied, but not what is older: %s; it is tried again with the next"
            log.warning(told, checkpoint, self._failure)
        finally:
            self._copying = None
            release(checkpoint)

    def _copy(self, newest: Path) -> None:
        """Makes the store hold the newest checkpoint, and then those before it that it lacks."""
        train, store, start = self._train, self._store, time.monotonic()
        there = store.complete()
        if not self._known and there and step_of(there[-1]) > step_of(newest.name):
            log.warning(
                "%s holds %s, later than %s, from which this run goes on; to go on from the store instead, stop and remove %s",
                store.url, there[-1], newest.name, newest.parent / "latest",
            )  # fmt: skip
        if not (newest / SUMS).exists():
            raise ValueError("it has no checksums (format version 2); the next checkpoint will have them")
        if not self._holds(newest, there):
            size = store.upload(newest)
            self._known[newest.name] = (newest / SUMS).read_bytes()
            seconds = round(time.monotonic() - start, 1)
            log_event(
                self._run_dir, "copied", step_of(newest.name), to=store.url, mib=round(size / 2**20, 1), seconds=seconds
            )
        for pattern in _BESIDE:
            for path in sorted(self._run_dir.glob(pattern)):
                store.write(path.relative_to(self._run_dir).as_posix(), path.read_bytes())
        store.point_latest(newest.name)
        self._copied = newest.name
        policy = train.keep_checkpoints, train.keep_every, train.keep_best
        here = checkpoints(newest.parent, newest)
        old = superseded_checkpoints(here, *policy)
        for path in reversed(here[:-1]):
            if path not in old and (path / SUMS).exists():  # not of format version 2
                self._copy_older(path, there)
        store.prune(*policy)

    def _copy_older(self, checkpoint: Path, there: list[str]) -> None:
        try:
            if not self._holds(checkpoint, there):
                self._store.upload(checkpoint)
                self._known[checkpoint.name] = (checkpoint / SUMS).read_bytes()
        except (ValueError, OSError):
            if checkpoint.exists():
                raise  # else it was pruned meanwhile

    def _holds(self, checkpoint: Path, there: list[str]) -> bool:
        """Whether the store has it, and not another one of that step."""
        if checkpoint.name not in there:
            return False
        if checkpoint.name not in self._known:
            self._known[checkpoint.name] = self._store.sums(checkpoint.name)
        return self._known[checkpoint.name] == (checkpoint / SUMS).read_bytes()
