"""One corpus as an endless, exactly resumable sequence of samples."""

import logging
import socket
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from titans_pretrain.data.background import Background
from titans_pretrain.data.manifest import MANIFEST, Manifest
from titans_pretrain.data.packing import hash_key
from titans_pretrain.data.storage import Folder, ShardError
from titans_pretrain.data.tokenizer import read_tokenizer_entry
from titans_pretrain.data.window import Window, windows_of_epoch

log = logging.getLogger(__name__)

# Called on every process of a run; the answer has the arguments of all, in the same order
Gather = Callable[[Any], list]


class NoDocuments(ValueError):
    """The split holds nothing."""


def alone(what: Any) -> list:
    """The Gather of one process."""
    return [what]


def open_manifest(folder: Folder, fresh: bool = True) -> Manifest:
    """Reads and checks manifest and tokenizer of a data folder. fresh: not out of the cache, where one could belong to a
    corpus that has since been replaced. Raises ValueError."""
    where = folder.describe(MANIFEST)
    try:
        text = folder.read(MANIFEST, fresh=fresh)
    except ShardError as error:
        raise ValueError(f"{error}; is data.path a folder that `titans-data tokenize` has finished?") from None
    manifest = Manifest.from_json(text, where)
    if not folder.is_remote:
        found = read_tokenizer_entry(Path(folder.path) / "tokenizer")
        if found != manifest.tokenizer:
            raise ValueError(
                f"{folder.path}/tokenizer is not the tokenizer that made the tokens (fingerprint "
                f"{found.fingerprint[:12]}, the manifest says {manifest.tokenizer.fingerprint[:12]})"
            )
    return manifest


def open_manifests(folders: list[Folder], gather: Gather) -> list[Manifest]:
    """The manifests of all folders, the same on every process: one process of each machine downloads them, the others read what
    it has put into the cache. Raises ValueError, on every process, if one of them cannot, or if they differ."""
    me = (socket.gethostname(), uuid.uuid4().hex)
    first = next(other for other in gather(me) if other[0] == me[0]) == me
    manifests, failure = [], None
    for turn in (first, not first):
        if turn:
            try:
                manifests = [open_manifest(folder, fresh=first) for folder in folders]
            except (ValueError, OSError) as error:
                failure = str(error)
        for told in gather(failure):
            if told is not None:
                raise ValueError(told)
    for folder, seen in zip(folders, zip(*gather([manifest.fingerprint() for manifest in manifests]))):
        if len(set(seen)) > 1:
            raise ValueError(
                f"{folder.path} is not the same corpus on every process; was it being replaced? Start again"
            )
    return manifests


class Source:
    """Samples of one corpus, epoch after epoch; the cursor is (epoch, window, sample)."""

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        split: str,
        weights: list[float],
        seed: int,
        *,
        epochs: int | None,
        skip_bad_shards: bool,
        layout: dict,
        gather: Gather,
        pool: Background,
    ):
        """weights: in each mixture of the schedule, 0 where it is not part of it. layout: seq_len, multiple, reset_documents, split_documents of Window. pool: opens shards."""
        self.folder, self.manifest = folder, manifest
        self.fingerprint = self.manifest.fingerprint()
        self.weights, self.weight = weights, weights[0]
        self.drawn = 0  # samples taken since the weights of the mixture last changed
        self.skipped: dict[str, str] = {}  # shard name -> why it was left out
        self._split, self._seed, self._epochs = split, seed, epochs
        self._skip_bad_shards, self._layout, self._gather = skip_bad_shards, layout, gather
        if not self.manifest.splits.get(split):
            more = "text" if split == "train" else "documents, or with a larger --validation share"
            raise NoDocuments(f"{folder.path} has no {split} documents; tokenize more {more} into another folder")
        self.epoch, self.window, self.sample = 0, 0, 0
        self._left_out: list[int] = []  # shards that the current window does without, see Window
        self._window: Window | None = None  # opened when it is needed: a resumed run never needs the first one
        self._background, self._pool = Background(), pool
        self._following: Future | None = None  # the next window, packed (and downloaded) in the background

    @property
    def endless(self) -> bool:
        return self._epochs is None

    @property
    def exhausted(self) -> bool:
        return self._epochs is not None and self.epoch >= self._epochs

    def has_open(self, count: int) -> bool:
        """Whether so many samples more can be taken without opening a window."""
        return self._window is not None and self.sample + count <= self._window.samples

    def take(self, count: int) -> list[tuple[Window, int, int]]:
        """The next samples, `count` of them or all that the last epoch has left: stretches of (window, first sample, samples)."""
        stretches, found_in = [], self.epoch
        while count and not self.exhausted:
            window = self._open_current()
            samples = min(count, window.samples - self.sample)
            if samples > 0:
                stretches.append((window, self.sample, samples))
                count, found_in = count - samples, self.epoch
                self.drawn += samples
                self.sample += samples
                if self._following is None and 2 * self.sample >= window.samples:
                    self._prepare_following()
            if self.sample >= window.samples:
                (self.epoch, self.window), self.sample = self._after(), 0
                self._window, self._left_out = None, []
                if self.epoch > found_in + 1:  # every shard of every window was left out
                    raise ShardError(f"{self.folder.path}: no {self._split} shard can be read")
        return stretches

    def state_dict(self) -> dict:
        return {
            "manifest": self.fingerprint,
            "weight": self.weight,
            "drawn": self.drawn,
            "epoch": self.epoch,
            "window": self.window,
            "sample": self.sample,
            "left_out": self._left_out,
        }

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.window, self.sample = state["epoch"], state["window"], state["sample"]
        self.drawn, self._left_out = state["drawn"], state["left_out"]
        self._window = self._following = None

    def _windows(self, epoch: int) -> list[list[int]]:
        return windows_of_epoch(self.manifest.splits[self._split], self._seed, epoch)

    def _after(self) -> tuple[int, int]:
        """Epoch and window that follow the current ones."""
        last = self.window + 1 == len(self._windows(self.epoch))
        return (self.epoch + 1, 0) if last else (self.epoch, self.window + 1)

    def _open_current(self) -> Window:
        if self._window is None:
            following, self._following = self._following, None
            place = self.epoch, self.window
            window = following.result() if following else self._open(*place, self._left_out, self.sample > 0)
            # Who leaves out what another process lays out would read other rows: nobody reads what one cannot.
            while self._skip_bad_shards and len(found := {tuple(other) for other in self._gather(window.left_out)}) > 1:
                window = self._open(*place, sorted(set().union(*found)), self.sample > 0)
            if self.sample and window.left_out != self._left_out:
                log.warning(
                    "%s: the window is laid out anew without a shard's index; some of its rows come twice or not at all",
                    self.folder.path,
                )
            self._window, self._left_out = window, window.left_out
        return self._window

    def _prepare_following(self) -> None:
        epoch, window = self._after()
        if self._epochs is None or epoch < self._epochs:
            self._following = self._background.submit(self._open, epoch, window, [], False)

    def _open(self, epoch: int, window: int, left_out: list[int], begun: bool) -> Window:
        shards, key = self._windows(epoch)[window], hash_key(self._seed, epoch, window + 1)
        return Window(
            self.folder,
            self.manifest,
            self._split,
            shards,
            key,
            on_error=self._shard_failed,
            left_out=left_out,
            begun=begun,
            pool=self._pool,
            **self._layout,
        )

    def _shard_failed(self, number: int, error: ShardError) -> None:
        if not self._skip_bad_shards:
            raise ShardError(f"shard {error} (data.on_bad_shard=skip goes on without it)") from error
        name = self.manifest.splits[self._split][number].name
        if name not in self.skipped:
            log.warning("skipping shard %s", error)
            self.skipped[name] = str(error)
