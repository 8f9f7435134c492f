"""The average of the weights against the recurrence written down."""

import math

import pytest
import torch
from test_guard import harmed
from test_trainer import assert_same, run, weights

from titans_pretrain.checkpoint import read_tensors
from titans_pretrain.training.ema import average_weights
from titans_pretrain.training.loggers import read_metrics


def averages(trainer) -> dict[str, torch.Tensor]:
    state = trainer.engine.optimizer.state
    return {n: state[p]["ema"].clone() for n, p in trainer.engine.model.named_parameters()}


def test_it_follows_every_update_from_the_initial_weights_on(make_trainer):
    trainer = make_trainer(ema=0.9)
    expected = {n: w.double() for n, w in weights(trainer).items()}
    for _ in range(4):
        trainer.train_step()
        expected = {n: 0.9 * expected[n] + 0.1 * w.double() for n, w in weights(trainer).items()}
    for name, average in averages(trainer).items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_an_optimizer_that_nothing_guards():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    average_weights(optimizer, 0.75)
    for expected in (0.75, 0.3125):  # of weights 0 and -1
        weight.grad = torch.ones(1)
        optimizer.step()
        assert optimizer.state[weight]["ema"].item() == expected


def test_it_changes_nothing_else(make_trainer):
    one, other = make_trainer(ema=0.9), make_trainer()
    for _ in range(3):
        one.train_step()
        other.train_step()
    assert_same(weights(one), weights(other))


@pytest.mark.parametrize("at", [1, 3])
def test_a_step_without_an_update_does_not_count(make_trainer, at):
    trainer, twin = harmed(make_trainer, {at: math.nan}, ema=0.9, on_nan="skip"), make_trainer(ema=0.9)
    for step in range(1, 6):
        trainer.train_step()
        if step == at:
            [next(twin.reader) for _ in range(2)]
            twin.step += 1
        else:
            twin.train_step()
    assert_same(averages(trainer), averages(twin))


def test_a_resumed_run_has_the_same_one(make_trainer, tmp_path):
    how = {"steps": 6, "ema": 0.9, "checkpoint_every": 3}
    straight, resumed = run(make_trainer(**how), tmp_path / "a"), make_trainer(**how)
    resumed.resume(tmp_path / "a/checkpoints/step-00000003")
    assert_same(averages(run(resumed, tmp_path / "b")), averages(straight))
    last = read_tensors(straight.saved)
    assert_same({n: last[f"ema.{n}"] for n in weights(straight)}, averages(straight))


def test_it_can_begin_and_end_in_the_middle_of_a_run(make_trainer, tmp_path):
    plain = run(make_trainer(steps=3), tmp_path / "a")
    later = make_trainer(steps=5, ema=0.9)
    later.resume(plain.saved)
    assert_same(averages(later), weights(plain))
    run(later, tmp_path / "b")
    without = make_trainer(steps=5)
    without.resume(later.saved)
    assert_same(weights(without), weights(later))
    started = make_trainer(ema=0.9)
    started.start_from(later.saved)
    assert_same(averages(started), weights(later))


def test_validation_tells_both_losses(make_trainer, tmp_path):
    trainer = run(make_trainer(validate=True, steps=4, eval_every=2, eval_batches=2, ema=0.5), tmp_path)
    trainer.validator.average = False
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "validation_loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert trainer.validator.run(trainer.engine)["validation_loss"] == lines[-1]["validation_loss"]
    with torch.no_grad():
        for n, p in trainer.engine.model.named_parameters():
            p.copy_(averages(trainer)[n])
    assert trainer.validator.run(trainer.engine)["validation_loss"] == lines[-1]["validation_loss_ema"]
    assert lines[-1]["validation_loss_ema"] > lines[-1]["validation_loss"]  # it lags behind
