"""A run's checkpoints in an object store, or wherever fsspec reaches: copied there, pruned there, and fetched from there.

STORE/checkpoints/step-00000010/   a checkpoint; SHA256SUMS comes last and goes first: a folder without it is not whole
STORE/checkpoints/latest           the name of the newest one, written once that is whole
STORE/metrics.jsonl, ...           what a run folder has beside its checkpoints

These are the places that they have in a run folder, so a copy of a store is one. One run writes into a store, one thread of it at a
time. Every file is tried as often as those of data are (data/storage.py). Drivers take addresses and secrets from where they always do
(environment, files in the home folder, the machine's role): none passes through a config.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from titans_pretrain.checkpoint.checksums import SUMS, hash_files, parse_sums
from titans_pretrain.checkpoint.store import atomic_folder, point_latest, step_of, superseded, validation_loss
from titans_pretrain.checkpoint.together import DamagedCheckpoint
from titans_pretrain.data.storage import ShardError, with_retries

T = TypeVar("T")
LATEST = "checkpoints/latest"
_CHECKPOINT = re.compile(r"(.+)/checkpoints/(step-\d{8,})")


class RemoteStore:
    """Methods raise ValueError (ShardError) for what stays unreachable, and DamagedCheckpoint for what is not as it was written."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._losses: dict[str, float | None] = {}

    @cached_property
    def _place(self) -> tuple:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as e:  # no driver for this protocol
            raise ValueError(f"{self.url}: {e}") from None

    def complete(self) -> list[str]:
        """The names of the checkpoints that are whole, up to the one that `latest` names, in the order of their steps."""
        return self._complete(self._files())

    def sums(self, name: str) -> bytes:
        """SHA256SUMS of a checkpoint."""
        return self._read(f"checkpoints/{name}/{SUMS}")

    def upload(self, checkpoint: Path) -> int:
        """Copies a checkpoint, in the place of whatever has its name. Returns its size in bytes."""
        name, content = checkpoint.name, (checkpoint / SUMS).read_bytes()
        self._remove({name: self._files().get(name, set())})
        files = sorted(parse_sums(content, str(checkpoint / SUMS)))
        for file in files:
            self._put(checkpoint / file, f"checkpoints/{name}/{file}")
        self.write(f"checkpoints/{name}/{SUMS}", content)
        self._losses.pop(name, None)
        return sum((checkpoint / file).stat().st_size for file in files)

    def point_latest(self, name: str) -> None:
        self.write(LATEST, f"{name}\n".encode())

    def prune(self, keep: int, every: int, best: int) -> None:
        """Removes what prune_checkpoints would, and what an upload that never ended left behind."""
        files = self._files()
        names = self._complete(files)
        old = superseded(names, self._loss, keep, every, best)
        half = [name for name, there in files.items() if SUMS not in there]
        self._remove({name: files[name] for name in (*old, *half)})

    def download(self, name: str, target: Path) -> None:
        """Writes a checkpoint to `target`, whole or not at all, every file compared with its checksum."""
        content = self.sums(name)
        if (target / SUMS).is_file() and (target / SUMS).read_bytes() == content:
            return  # fetched before
        sums = parse_sums(content, f"{self.url}/checkpoints/{name}/{SUMS}")
        with atomic_folder(target) as folder:
            for file, expected in sums.items():
                self._get(f"checkpoints/{name}/{file}", folder / file)
                if hash_files(folder, [folder / file])[file] != expected:
                    raise DamagedCheckpoint(
                        f"{self.url}/checkpoints/{name}/{file} is damaged: its checksum is not the one in {SUMS}"
                    )
            (folder / SUMS).write_bytes(content)

    def write(self, name: str, content: bytes) -> None:
        """A small file, in one move where the store has such."""
        system, root = self._place
        self._make_parent(name)
        self._try(lambda: system.pipe_file(f"{root}/{name}", content), name)

    def fetch(self, name: str, target: Path) -> None:
        """A small file, unless it lies at `target` already, or there is none."""
        if not target.exists() and (content := self._read_if_there(name)) is not None:
            target.write_bytes(content)

    def _files(self) -> dict[str, set[str]]:
        """Checkpoint -> its files."""
        system, root = self._place

        def find() -> list[str]:
            system.invalidate_cache()
            return system.find(f"{root}/checkpoints")

        found: dict[str, set[str]] = {}
        for path in self._try(find, "checkpoints"):
            name, _, file = path.removeprefix(f"{root}/checkpoints/").partition("/")
            if step_of(name) is not None and file:
                found.setdefault(name, set()).add(file)
        return found

    def _complete(self, files: dict[str, set[str]]) -> list[str]:
        names = sorted((name for name, there in files.items() if SUMS in there), key=step_of)
        if not names or (content := self._read_if_there(LATEST)) is None:
            return names
        last = step_of(content.decode(errors="replace").strip())
        if last is None:
            raise ValueError(f"{self.url}/{LATEST} names no checkpoint: {content[:80]!r}; correct that file")
        return [name for name in names if step_of(name) <= last]

    def _loss(self, name: str) -> float | None:
        if name not in self._losses:
            content = self._read(f"checkpoints/{name}/trainer.json")  # what cannot be read now is not without a loss
            self._losses[name] = validation_loss(lambda: content)
        return self._losses[name]

    def _remove(self, files: dict[str, set[str]]) -> None:
        """Checkpoints with so many files, SHA256SUMS first: what is removed by half never looks whole."""
        system, root = self._place
        for name, there in files.items():
            for file in sorted(there, key=lambda file: file != SUMS):
                path = f"checkpoints/{name}/{file}"

                def remove(path: str = path) -> None:
                    with contextlib.suppress(FileNotFoundError):  # the answer to an earlier try was lost
                        system.rm_file(f"{root}/{path}")

                self._try(remove, path)

    def _put(self, source: Path, name: str) -> None:
        system, root = self._place
        self._make_parent(name)

        def put() -> None:
            system.put_file(str(source), f"{root}/{name}")
            if (there := system.size(f"{root}/{name}")) != (size := source.stat().st_size):
                raise OSError(f"{there} of {size} bytes arrived")

        self._try(put, name)

    def _get(self, name: str, target: Path) -> None:
        """Raises DamagedCheckpoint where there is no such file: a checkpoint names it."""
        system, root = self._place
        target.parent.mkdir(parents=True, exist_ok=True)
        missing = DamagedCheckpoint(f"{self.url}/{name} is not there")

        def get() -> None:
            try:
                system.get_file(f"{root}/{name}", str(target))
            except FileNotFoundError:
                raise missing from None

        self._try(get, name, str(target.parent))

    def _read(self, name: str) -> bytes:
        system, root = self._place
        return self._try(lambda: system.cat_file(f"{root}/{name}"), name)

    def _read_if_there(self, name: str) -> bytes | None:
        try:
            return self._read(name)
        except ShardError as e:
            if isinstance(e.__cause__, FileNotFoundError):
                return None
            raise

    def _make_parent(self, name: str) -> None:
        """Where there are folders. An object store has none, and its drivers would make a bucket that was only misspelled."""
        from fsspec.implementations.local import LocalFileSystem

        system, root = self._place
        if isinstance(system, LocalFileSystem):
            (Path(root) / name).parent.mkdir(parents=True, exist_ok=True)

    def _try(self, action: Callable[[], T], name: str, folder: str = "the store") -> T:
        def call() -> T:
            try:
                return action()
            except (OSError, DamagedCheckpoint):
                raise
            except Exception as e:  # drivers have errors of their own
                raise OSError(f"{type(e).__name__}: {' '.join(str(e).split())}") from e

        return with_retries(call, f"{self.url}/{name}", folder=folder)


def fetch_checkpoint(url: str, folder: Path, files: Sequence[str] = ()) -> Path | None:
    """FOLDER/checkpoints/step-N, copied from a store: its newest checkpoint that is whole, or the one that `url` names. None: the store
    holds none. files: small ones beside it that come along. A damaged one is told and gives way to the one before it.

    Raises ValueError where the store cannot be read, DamagedCheckpoint where nothing in it is whole, OSError for a full disk."""
    named = _CHECKPOINT.fullmatch(url.rstrip("/"))
    store = RemoteStore(named[1] if named else url.rstrip("/").removesuffix("/checkpoints"))
    names = [named[2]] if named else store.complete()
    for name in reversed(names):
        target = folder / "checkpoints" / name
        try:
            store.download(name, target)
        except DamagedCheckpoint as e:
            if named:
                raise
            print(f"WARNING: {e}; looks for the checkpoint before it", file=sys.stderr, flush=True)
            continue
        for file in files:
            store.fetch(file, folder / file)
        point_latest(target)
        return target
    if names:
        raise DamagedCheckpoint(f"no checkpoint in {url} is whole; give another train.checkpoint_store or train.resume")
    return None
