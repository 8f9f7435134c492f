"""One corpus as an endless, exactly resumable sequence of samples."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from titans_pretrain.data.manifest import MANIFEST, Manifest
from titans_pretrain.data.packing import hash_key
from titans_pretrain.data.storage import Folder, ShardError
from titans_pretrain.data.tokenizer import read_tokenizer_entry
from titans_pretrain.data.window import Window, windows_of_epoch

log = logging.getLogger(__name__)


class NoDocuments(ValueError):
    """The split holds nothing."""


def open_manifest(folder: Folder) -> Manifest:
    """Reads and checks manifest and tokenizer of a data folder. Raises ValueError."""
    where = folder.describe(MANIFEST)
    try:
        # downloaded anew each time: a cached one could belong to a corpus that has since been replaced
        text = folder.read(MANIFEST, fresh=True).decode()
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


class Source:
    """Samples of one corpus, epoch after epoch; the cursor is (epoch, window, sample)."""

    def __init__(
        self,
        folder: Folder,
        split: str,
        weight: float,
        seed: int,
        *,
        epochs: int | None,
        skip_bad_shards: bool,
        layout: dict,
    ):
        """layout: seq_len, multiple, reset_documents, split_documents of Window."""
        self.folder = folder
        self.manifest = open_manifest(folder)
        self.fingerprint = self.manifest.fingerprint()
        self.weight = weight
        self.drawn = 0  # samples taken since the weights of the mixture last changed
        self.skipped: dict[str, str] = {}  # shard name -> why it was left out
        self._split, self._seed, self._epochs = split, seed, epochs
        self._skip_bad_shards, self._layout = skip_bad_shards, layout
        if not self.manifest.splits.get(split):
            more = "text" if split == "train" else "documents, or with a larger --validation share"
            raise NoDocuments(f"{folder.path} has no {split} documents; tokenize more {more} into another folder")
        self.epoch, self.window, self.sample = 0, 0, 0
        self._left_out: list[int] = []  # shards that the current window does without, see Window
        self._window: Window | None = None  # opened when it is needed: a resumed run never needs the first one
        self._thread = ThreadPoolExecutor(1)
        self._following: Future | None = None  # the next window, packed (and downloaded) in the background

    @property
    def exhausted(self) -> bool:
        return self._epochs is not None and self.epoch >= self._epochs

    def next(self) -> tuple[Window, int] | None:
        """The next sample: the window it is in and its number there. None when all epochs are read."""
        first = self.epoch
        while not self.exhausted:
            window = self._open_current()
            sample = self.sample
            if sample < window.samples:
                self.drawn += 1
                self.sample += 1
                if self._following is None and 2 * self.sample >= window.samples:
                    self._prepare_following()
            if self.sample >= window.samples:
                (self.epoch, self.window), self.sample = self._after(), 0
                self._window, self._left_out = None, []
            if sample < window.samples:
                return window, sample
            # every shard of that window was left out
            if self.epoch > first + 1:
                raise ShardError(f"{self.folder.path}: no {self._split} shard can be read")
        return None

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
            self._window = following.result() if following else self._open(self.epoch, self.window, self._left_out)
            self._left_out = self._window.left_out
        return self._window

    def _prepare_following(self) -> None:
        epoch, window = self._after()
        if self._epochs is None or epoch < self._epochs:
            self._following = self._thread.submit(self._open, epoch, window, [])

    def _open(self, epoch: int, window: int, left_out: list[int]) -> Window:
        shards, key = self._windows(epoch)[window], hash_key(self._seed, epoch, window + 1)
        return Window(
            self.folder,
            self.manifest,
            self._split,
            shards,
            key,
            on_error=self._shard_failed,
            left_out=left_out,
            **self._layout,
        )

    def _shard_failed(self, number: int, error: ShardError) -> None:
        if not self._skip_bad_shards:
            raise ShardError(f"shard {error} (data.on_bad_shard=skip goes on without it)") from error
        name = self.manifest.splits[self._split][number].name
        if name not in self.skipped:
            log.warning("skipping shard %s", error)
            self.skipped[name] = str(error)
