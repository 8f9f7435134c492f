"""Checkpoint folders on disk: written whole or not at all, found, and cleared away.

RUN/checkpoints/step-00000010/   one complete checkpoint
RUN/checkpoints/latest           text: the name of the newest one
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The checkpoint that RUN/checkpoints/latest names; None when the run has none."""
    pointer = Path(run_dir) / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    found = pointer.parent / pointer.read_text().strip()
    if not (found / "trainer.json").is_file():
        there = ", ".join(p.name for p in _complete(pointer.parent)) or "none"
        raise ValueError(
            f"{pointer} names {found.name}, which is not there (complete checkpoints: {there}); correct that file"
        )
    return found


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest one of a run folder."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no run or checkpoint folder {path}")
    if (path / "trainer.json").is_file():
        return path
    found = latest_checkpoint(path.parent if path.name == "checkpoints" else path)
    if found is None:
        raise ValueError(f"{path} holds no checkpoint (neither trainer.json nor checkpoints/latest); give a run folder")
    return found


def find_tokenizer(path: str | Path) -> Path:
    """The tokenizer folder of a run, from its run or checkpoint folder."""
    run_dir = find_checkpoint(path).resolve().parents[1]
    if not (run_dir / "tokenizer").is_dir():
        raise FileNotFoundError(f"{run_dir} has no folder tokenizer; copy it there from the folder of the run's data")
    return run_dir / "tokenizer"


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `target` at the end, on disk; on an error nothing of it stays."""
    begin_folder(target)
    try:
        yield temporary_folder(target)
        finish_folder(target)
    except BaseException:
        drop_folder(target)
        raise


def temporary_folder(target: Path) -> Path:
    """Where `target` is written until it is whole."""
    return target.parent / f".writing-{target.name}"


def begin_folder(target: Path) -> None:
    """Makes an empty temporary folder."""
    drop_folder(target)
    temporary_folder(target).mkdir(parents=True)


def finish_folder(target: Path) -> None:
    """Makes the temporary folder the target, on disk, in one move."""
    temporary = temporary_folder(target)
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    if target.exists():
        _remove(target)
    os.rename(temporary, target)
    _sync(target.parent)


def drop_folder(target: Path) -> None:
    """Removes the temporary folder and what is in it."""
    shutil.rmtree(temporary_folder(target), ignore_errors=True)


def point_latest(target: Path) -> None:
    """Makes RUN/checkpoints/latest name `target`."""
    temporary = target.parent / ".writing-latest"
    temporary.write_text(target.name + "\n")
    _sync(temporary)
    os.replace(temporary, target.parent / "latest")
    _sync(target.parent)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints (0: keeps all)."""
    if keep:
        for old in _complete(folder)[:-keep]:
            _remove(old)


def clear_leftovers(folder: Path) -> None:
    """Removes what a killed process left half written."""
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _complete(folder: Path) -> list[Path]:
    return sorted(p.parent for p in folder.glob("step-*/trainer.json"))


def _remove(folder: Path) -> None:
    """Out of sight in one move first, so that a half-removed folder never looks like a checkpoint."""
    doomed = folder.parent / f".writing-removed-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
