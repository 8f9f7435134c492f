"""The order in which a checkpoint reaches the disk, and what is removed when."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from titans_pretrain.checkpoint import checkpoints, latest_checkpoint, store
from titans_pretrain.training.signals import StopRequest


@pytest.fixture
def calls(monkeypatch):
    """What reaches the disk, in order: ("sync", path as it is then named), ("move", from, to)."""
    seen = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def synced(descriptor):
        fd = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{fd}"))))
        fsync(descriptor)

    def moved(move):
        def call(a, b, **options):
            seen.append(("move", Path(a), Path(b)))
            move(a, b, **options)

        return call

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", moved(rename))
    monkeypatch.setattr(os, "replace", moved(replace))
    return seen


def test_a_checkpoint_is_on_disk_before_it_is_seen_and_before_latest_names_it(make_trainer, tmp_path, calls):
    trainer = make_trainer()
    trainer.train_step()
    run = tmp_path / "a/run"
    trainer.save(run)
    folder, target = run / "checkpoints", run / "checkpoints/step-00000001"
    temporary = folder / ".writing-step-00000001"
    appears = calls.index(("move", temporary, target))
    names = calls.index(("move", folder / ".writing-latest", folder / "latest"))
    written = {temporary / path.relative_to(target) for path in [target, *target.rglob("*")]}
    assert len(written) >= 7  # the folder, weights/ and the five files in them
    last = {path: max(i for i, call in enumerate(calls) if call == ("sync", path)) for path in written}
    assert all(i < appears for i in last.values())
    after = calls.index(("sync", folder), appears)
    assert appears < after < names
    assert ("sync", folder / ".writing-latest") in calls[after:names]
    assert ("sync", folder) in calls[names:]
    for made in (tmp_path / "a", run, folder):  # folders that were not there before
        assert ("sync", made.parent) in calls[:appears], made


def test_an_earlier_checkpoint_of_the_step_stays_until_the_new_one_is_there(make_trainer, tmp_path, calls):
    trainer = make_trainer()
    trainer.train_step()
    trainer.save(tmp_path)
    trainer.saved = None
    calls.clear()
    trainer.save(tmp_path)
    folder = tmp_path / "checkpoints"
    target, aside = folder / "step-00000001", folder / ".replaced-step-00000001"
    moves = [call[1:] for call in calls if call[0] == "move"]
    assert moves[:2] == [(target, aside), (folder / ".writing-step-00000001", target)]
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000001"]


def make(folder: Path, *steps: int) -> list[Path]:
    for step in steps:
        (folder / store.checkpoint_name(step)).mkdir(parents=True)
        (folder / store.checkpoint_name(step) / "trainer.json").write_text("{}")
    return [folder / store.checkpoint_name(step) for step in steps]


def steps(folder: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in checkpoints(folder)]


def test_a_killed_replacement_is_put_back(tmp_path):
    (old,) = make(tmp_path, 3)
    (old / "mine").touch()
    os.rename(old, tmp_path / ".replaced-step-00000003")
    store.clear_leftovers(tmp_path)
    assert (old / "mine").exists()
    os.rename(old, tmp_path / ".replaced-step-00000003")
    make(tmp_path, 3)
    store.clear_leftovers(tmp_path)
    assert not (old / "mine").exists() and [p.name for p in tmp_path.iterdir()] == [old.name]


def test_a_replacement_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    (target,) = make(tmp_path, 3)
    store.begin_folder(target)
    rename = os.rename

    def failing(a, b):
        if Path(a).name.startswith(".writing"):
            raise OSError(5, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        store.finish_folder(target)
    assert steps(tmp_path) == [3]


@pytest.mark.parametrize(
    ("there", "newest", "keep", "left"),
    [
        ([100, 200, 300, 400], 400, 2, [300, 400]),
        ([100, 200, 300, 400], 400, 0, [100, 200, 300, 400]),
        ([100, 200, 250, 300, 400, 500], 250, 3, [100, 200, 250, 300, 400, 500]),  # went back from 500 to 200
        ([100, 200, 250, 300, 400, 500], 250, 1, [250, 300, 400, 500]),
        ([99_999_999, 100_000_000, 100_000_001], 100_000_001, 2, [100_000_000, 100_000_001]),  # a digit more
    ],
)
def test_the_newest_is_never_removed_nor_are_later_steps(tmp_path, there, newest, keep, left):
    folder = tmp_path / "checkpoints"
    make(folder, *there)
    store.point_latest(folder / store.checkpoint_name(newest))
    store.prune_checkpoints(folder, keep)
    assert steps(folder) == left
    assert not list(folder.glob(".*"))


def test_some_are_kept_for_ever_and_the_best_by_validation(tmp_path):
    folder = tmp_path / "checkpoints"
    losses = {100: 3.5, 200: 2.0, 300: None, 400: 2.5, 500: float("nan"), 600: 2.2, 700: 2.9}
    for step, loss in losses.items():
        make(folder, step)
        if loss is not None:
            (folder / store.checkpoint_name(step) / "trainer.json").write_text(json.dumps({"validation_loss": loss}))
    store.point_latest(folder / store.checkpoint_name(700))
    store.prune_checkpoints(folder, 1, every=300, best=2)
    assert steps(folder) == [200, 300, 600, 700]
    store.prune_checkpoints(folder, 1, best=1)
    assert steps(folder) == [200, 700]


def test_a_run_keeps_its_best(make_trainer, tmp_path):
    """The loss falls, then a rate that is far too high raises it."""
    trainer = make_trainer(
        validate=True, keep_checkpoints=1, keep_best=1, checkpoint_every=1, eval_every=2, steps=8, schedule="constant"
    )
    step = trainer.train_step

    def stepping():
        trainer.config.train.lr = 5.0 if trainer.step >= 6 else 1e-2
        return step()

    trainer.train_step = stepping
    logged = []
    trainer.run(tmp_path, [SimpleNamespace(log=logged.append, flush=lambda: None)], None, StopRequest())
    found = {line["step"]: line["validation_loss"] for line in logged if "validation_loss" in line}
    assert min(found, key=found.get) == 6 and sorted(found) == [2, 4, 6, 8]
    assert steps(tmp_path / "checkpoints") == [6, 8]


@pytest.mark.parametrize("refused", ["rename", "rmtree"])
def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(make_trainer, tmp_path, monkeypatch, caplog, refused):
    trainer = make_trainer(keep_checkpoints=1)
    rmtree, rename = store.shutil.rmtree, os.rename

    def stubborn(path, *args, **options):
        if "removed-step" in str(path):
            raise OSError(39, "Directory not empty", str(path))
        rmtree(path, *args, **options)

    def stuck(a, b):
        if "removed-step" in str(b):
            raise OSError(13, "Permission denied", str(a))
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "rename", stuck) if refused == "rename" else (store.shutil, "rmtree", stubborn)))
        for _ in range(2):
            trainer.train_step()
            trainer.save(tmp_path)
    assert latest_checkpoint(tmp_path).name == "step-00000002"
    assert "cannot remove" in caplog.text
    trainer.train_step()
    trainer.save(tmp_path)  # and tries again
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000003"]


@pytest.mark.parametrize("content", [b"../../elsewhere", b"\xff\xfe", b"", b"step-1\nstep-2", b"/etc"])
def test_latest_names_a_checkpoint_beside_it_and_nothing_else(tmp_path, content):
    make(tmp_path / "checkpoints", 3)
    (tmp_path / "checkpoints/latest").write_bytes(content)
    with pytest.raises(ValueError, match=r"latest names .*not there \(complete checkpoints: step-00000003\)"):
        latest_checkpoint(tmp_path)


def test_checkpoints_have_the_permissions_that_the_umask_gives(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train_step()
    before = os.umask(0o027)
    try:
        trainer.save(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert all(
        mode == (0o750 if "." not in name and name not in ("latest", "SHA256SUMS") else 0o640)
        for name, mode in modes.items()
    ), modes
    assert json.loads((trainer.saved / "trainer.json").read_text())["version"] == 3
