"""When hooks are called, and that their state goes on."""

import contextlib

import pytest
from test_trainer import assert_same, run, weights

from titans_pretrain.checkpoint import read_trainer
from titans_pretrain.training.hooks import Hook
from titans_pretrain.training.loggers import read_metrics


class Counting(Hook):
    name = "counting"

    def __init__(self):
        self.seen, self.count = [], 0

    @contextlib.contextmanager
    def around_step(self, trainer):
        self.seen.append(f"before {trainer.step + 1}")
        yield

    def after_step(self, trainer, line):
        self.count += 1
        self.seen.append(f"after {trainer.step}")
        line["count"] = self.count

    def after_validation(self, trainer, line):
        self.seen.append(f"validated {line['step']}")

    def after_save(self, trainer, checkpoint):
        self.seen.append(f"saved {checkpoint.name[-1]}")

    def after_run(self, trainer):
        self.seen.append(f"done {trainer.saved.name[-1]}")

    def on_error(self, trainer, error):
        self.seen.append(f"error {error}")

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_the_order_of_calls_and_the_numbers_they_add(make_trainer, tmp_path):
    trainer, hook = make_trainer(steps=3, validate=True, eval_every=2, checkpoint_every=2), Counting()
    trainer.hooks = [hook, Hook()]
    run(trainer, tmp_path / "a")
    steps = (
        "before 1, after 1, before 2, after 2, validated 2, saved 2, before 3, after 3, validated 3, saved 3, done 3"
    )
    assert hook.seen == steps.split(", ")
    assert [line["count"] for line in read_metrics(tmp_path / "a/metrics.jsonl") if "lr" in line] == [1, 2, 3]
    assert_same(weights(trainer), weights(run(make_trainer(steps=3), tmp_path / "twin")))


def test_their_state_is_in_the_checkpoint(make_trainer, tmp_path):
    first, second = make_trainer(steps=4, checkpoint_every=2), make_trainer(steps=4)
    first.hooks, second.hooks = [Counting()], [Hook(), Counting()]
    run(first, tmp_path)
    checkpoint = tmp_path / "checkpoints/step-00000002"
    assert read_trainer(checkpoint)["hooks"] == {"counting": {"count": 2}}
    second.resume(checkpoint)
    assert second.hooks[1].count == 2
    without = make_trainer()
    without.resume(checkpoint)  # a hook that is no more is no error


def test_an_error_is_told(make_trainer, tmp_path):
    trainer, hook = make_trainer(steps=3), Counting()
    trainer.hooks = [hook]
    trainer.engine.model.loss_scale = float("nan")
    with pytest.raises(ValueError, match="the loss is nan"):
        run(trainer, tmp_path)
    assert hook.seen[-1].startswith("error step 1: the loss is nan")
