"""Checkpoints that are written while training goes on."""

import threading

import pytest
import torch
from test_trainer import assert_same, run, weights

from titans_pretrain.checkpoint import checkpoints, latest_checkpoint, read_tensors, read_trainer
from titans_pretrain.checkpoint import saver as saver_module
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


def test_what_cannot_be_written_ends_the_run_soon(make_trainer, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    trainer = make_trainer(steps=2000, checkpoint_every=0, checkpoint_async=True)
    trainer.train_step()
    trainer.save(tmp_path)
    trainer._settle()
    monkeypatch.setattr("titans_pretrain.checkpoint.state.point_latest", full)
    trainer.train_step()
    trainer.save(tmp_path)  # fails while the steps go on
    with pytest.raises(OSError, match=r"step 2: cannot write .*No space left.*earlier checkpoints are untouched"):
        run(trainer, tmp_path)
    assert trainer.step < 2000
    assert latest_checkpoint(tmp_path).name == "step-00000001"
