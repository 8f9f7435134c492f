"""Checkpoint folders on disk: written whole or not at all, found, and cleared away.

RUN/checkpoints/step-00000010/   one complete checkpoint
RUN/checkpoints/latest           text: the name of the newest one
"""

import contextlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from titans_pretrain.disk import sync

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Of what checkpoint_name gave; None for any other text."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The checkpoint that RUN/checkpoints/latest names; None when the run has none."""
    pointer = Path(run_dir) / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    name = pointer.read_bytes().decode(errors="replace").strip()
    if not _NAME.fullmatch(name) or not (pointer.parent / name / "trainer.json").is_file():
        there = ", ".join(p.name for p in checkpoints(pointer.parent)) or "none"
        raise ValueError(
            f"{pointer} names {name[:80]!r}, which is not there (complete checkpoints: {there}); correct that file"
        )
    return pointer.parent / name


def checkpoints(folder: Path, up_to: Path | None = None) -> list[Path]:
    """The complete checkpoints of RUN/checkpoints in the order of their steps; up_to: only that one and those before it."""
    found = {step_of(p.parent.name): p.parent for p in folder.glob("step-*/trainer.json")}
    steps = {step: path for step, path in found.items() if step is not None}
    last = step_of(up_to.name) if up_to else max(steps, default=0)
    return [path for step, path in sorted(steps.items()) if step <= last]


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
    _restore(target)
    make_folder(target.parent)
    temporary_folder(target).mkdir()


def finish_folder(target: Path) -> None:
    """Makes the temporary folder the target, on disk, in one move. An earlier target is removed only after that."""
    temporary, aside = temporary_folder(target), _aside(target)
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    if target.exists():
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        _restore(target)
        raise
    sync(target.parent)
    _remove_tree(aside)


def drop_folder(target: Path) -> None:
    """Removes the temporary folder and what is in it."""
    shutil.rmtree(temporary_folder(target), ignore_errors=True)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, on disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def point_latest(target: Path) -> None:
    """Makes RUN/checkpoints/latest name `target`."""
    write_text(target.parent / "latest", target.name + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, on disk."""
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_text(text)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def prune_checkpoints(folder: Path, keep: int, every: int = 0, best: int = 0) -> None:
    """Of the one that RUN/checkpoints/latest names and those before it, removes all but the `keep` last (0: keeps all), those of steps
    that are multiples of `every`, and the `best` ones by the validation loss in their trainer.json.

    Those of later steps stay: whoever went back to an earlier one may want them. So do those that are held, until the next time. What
    cannot be removed is told and tried again the next time: it never ends a run."""
    for old in superseded_checkpoints(checkpoints(folder, latest_checkpoint(folder.parent)), keep, every, best):
        if old in _held:
            continue
        try:  # out of sight in one move first, so that a half-removed folder never looks like a checkpoint
            os.rename(old, old.with_name(f"{_DOOMED}{old.name}"))
        except OSError as e:
            log.warning("cannot remove the old checkpoint %s: %s; training goes on", old, e)
    for doomed in folder.glob(f"{_DOOMED}*"):
        _remove_tree(doomed)


def superseded(
    names: Sequence[str], loss: Callable[[str], float | None], keep: int, every: int = 0, best: int = 0
) -> list[str]:
    """Of names in the order of their steps, those that the policy of prune_checkpoints gives up. loss(name): of its validation, if any."""
    losses = {name: x for name in names if (x := loss(name)) is not None} if best else {}
    kept = {*sorted(losses, key=losses.get)[:best], *(name for name in names if every and step_of(name) % every == 0)}
    return [name for name in (names[:-keep] if keep else []) if name not in kept]


def superseded_checkpoints(known: Sequence[Path], keep: int, every: int = 0, best: int = 0) -> list[Path]:
    """The same of folders."""
    paths = {path.name: path for path in known}

    def loss(name: str) -> float | None:
        return validation_loss(lambda: (paths[name] / "trainer.json").read_bytes())

    return [paths[name] for name in superseded(list(paths), loss, keep, every, best)]


def validation_loss(read: Callable[[], bytes]) -> float | None:
    """Of the weights in a checkpoint; None where they were not validated. read() -> its trainer.json."""
    with contextlib.suppress(OSError, ValueError):
        loss = json.loads(read()).get("validation_loss")
        return loss if isinstance(loss, float) and math.isfinite(loss) else None
    return None


_held: set[Path] = set()


def hold(checkpoint: Path) -> None:
    """Keeps prune_checkpoints from a checkpoint that a thread of this process reads, until `release`."""
    _held.add(checkpoint)


def release(checkpoint: Path) -> None:
    _held.discard(checkpoint)


def clear_leftovers(folder: Path) -> None:
    """Removes what a killed process left half written, and puts back what it was about to replace."""
    for aside in folder.glob(f"{_ASIDE}*"):
        _restore(folder / aside.name.removeprefix(_ASIDE))
    for path in folder.glob(".writing-*"):
        _remove_tree(path) if path.is_dir() else path.unlink(missing_ok=True)


_DOOMED, _ASIDE = ".writing-removed-", ".replaced-"


def _aside(target: Path) -> Path:
    """Where an earlier `target` waits while a new one takes its place."""
    return target.with_name(_ASIDE + target.name)


def _restore(target: Path) -> None:
    aside = _aside(target)
    if aside.exists():
        _remove_tree(aside) if target.exists() else os.rename(aside, target)


def _remove_tree(path: Path) -> None:
    if path.exists():
        try:
            shutil.rmtree(path)
        except OSError as e:
            log.warning("cannot remove %s: %s; it can be removed by hand", path, e)
