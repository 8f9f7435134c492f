"""Checkpoints that are written while training goes on."""

import errno
import os
import threading

import pytest
import torch
from test_trainer import assert_same, run, weights

from titans_pretrain.checkpoint import check_checkpoint, checkpoints, latest_checkpoint, read_tensors, read_trainer
from titans_pretrain.checkpoint import saver as saver_module
from titans_pretrain.training.hooks import Hook
from titans_pretrain.training.loggers import read_metrics


@pytest.fixture
def held(monkeypatch):
    """An event that background writes wait for."""
    go, write = threading.Event(), saver_module.write_snapshot

    def later(*args):
        assert go.wait(60)
        return write(*args)

    monkeypatch.setattr(saver_module, "write_snapshot", later)
    return go


def test_a_checkpoint_holds_the_step_that_it_is_of(make_trainer, tmp_path, held):
    one, other = make_trainer(checkpoint_async=True), make_trainer()
    for trainer, name in ((one, "a"), (other, "b")):
        for _ in range(2):
            trainer.train_step()
        torch.manual_seed(5)
        trainer.save(tmp_path / name) if trainer is one else None
    assert not (tmp_path / "a/checkpoints/latest").exists()
    for _ in range(2):
        one.train_step()  # while it is not yet written
        torch.rand(3)
    held.set()
    one._settle()
    torch.manual_seed(5)
    other.save(tmp_path / "b")
    found, expected = (read_tensors(latest_checkpoint(tmp_path / name)) for name in "ab")
    assert_same(found, expected)
    assert read_trainer(one.saved) == read_trainer(other.saved)
    assert (one.saved / "rng.pt").read_bytes() == (other.saved / "rng.pt").read_bytes()


def test_the_next_one_and_the_end_wait_for_it(make_trainer, tmp_path):
    trainer = run(make_trainer(steps=5, checkpoint_every=1, checkpoint_async=True, keep_checkpoints=0), tmp_path)
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == [f"step-{i:08d}" for i in range(1, 6)]
    assert trainer.saved == latest_checkpoint(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line.get("checkpoint_stall", 0) > 0] == [2, 3, 4, 5]
    assert_same(weights(trainer), weights(run(make_trainer(steps=5), tmp_path / "twin")))


def test_a_harmful_step_does_not_lose_the_checkpoint_before_it(make_trainer, tmp_path, held):
    trainer = make_trainer(steps=9, checkpoint_every=2, checkpoint_async=True)
    step = trainer.train_step

    def stepping():
        if trainer.step == 2:  # whose checkpoint is being written
            trainer.engine.model.loss_scale = float("nan")
            held.set()
        return step()

    trainer.train_step = stepping
    with pytest.raises(ValueError, match="step 3: the loss is nan.*the last good checkpoint is .*step-00000002"):
        run(trainer, tmp_path)
    assert latest_checkpoint(tmp_path).name == "step-00000002"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.ESTALE, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("at", ["begin_folder", "finish_folder", "point_latest"])
def test_what_cannot_be_written_ends_the_run_soon(make_trainer, tmp_path, monkeypatch, at, code):
    def refused(*args):
        raise OSError(code, os.strerror(code))

    trainer = make_trainer(steps=2000, checkpoint_every=0, checkpoint_async=True)
    trainer.train_step()
    trainer.save(tmp_path)
    trainer._settle()
    monkeypatch.setattr(f"titans_pretrain.checkpoint.state.{at}", refused)
    trainer.train_step()
    trainer.save(tmp_path)  # fails while the steps go on
    told = f"step 2: cannot write .*{os.strerror(code)}; earlier checkpoints are untouched: see to room, permission and mount"
    with pytest.raises(OSError, match=told):
        run(trainer, tmp_path)
    assert trainer.step < 2000
    assert latest_checkpoint(tmp_path).name == "step-00000001"


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("mounted_at", ["run", "."])
@pytest.mark.parametrize("step", [1, 3])  # before the first checkpoint and after it
def test_a_run_folder_that_is_unmounted_ends_the_run(make_trainer, tmp_path, in_background, mounted_at, step):
    """What lies below a mount shows when it is gone: an empty folder, on a disk that is not the run's."""
    disk, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    mount, run_dir = disk / mounted_at, disk / "run"
    run_dir.mkdir(parents=True)

    class Unmounting(Hook):
        def after_step(self, trainer, line):
            if line["step"] == step:
                trainer._settle()
                mount.rename(elsewhere)
                mount.mkdir()

    trainer = make_trainer(steps=9, checkpoint_every=2, checkpoint_async=in_background)
    trainer.hooks.append(Unmounting())
    with pytest.raises(
        OSError, match=f"step {step + 1}: cannot write .*was there and is gone .has its disk been unmounted"
    ):
        run(trainer, run_dir)
    assert list(mount.iterdir()) == []
    kept = latest_checkpoint(elsewhere if mounted_at == "run" else elsewhere / "run")
    if step == 1:
        assert kept is None
    else:
        assert kept.name == "step-00000002"
        check_checkpoint(kept)
