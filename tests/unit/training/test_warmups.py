"""Steps that grow: each is what a run of that size would do, and a checkpoint anywhere goes on as if nothing had been."""

import pytest
import torch
from test_trainer import assert_same, run, weights

from titans_pretrain.checkpoint import latest_checkpoint
from titans_pretrain.config import Config, DataConfig, MemoryConfig, ModelConfig, TrainConfig
from titans_pretrain.training import gauge, progress
from titans_pretrain.training.gauge import Gauge, model_flops
from titans_pretrain.training.loggers import read_metrics
from titans_pretrain.training.progress import Progress

WARM = {"global_batch": 8, "batch_warmup": [[0, 2], [2, 4], [4, 8]], "steps": 6}


def test_a_step_is_that_of_a_run_with_its_batch(make_trainer, tmp_path):
    """Three runs of two steps, one after the other, against the one that grows: bit for bit, the data too."""
    warm = run(make_trainer(**WARM), tmp_path / "warm")
    parts, before = None, None
    for steps, batch in ((2, 2), (4, 4), (6, 8)):
        parts = make_trainer(steps=6, global_batch=batch)  # all with one schedule of the learning rate
        if before is not None:
            parts.resume(before)
        while parts.step < steps:
            parts.train_step()
        parts.save(tmp_path / "parts")
        before = latest_checkpoint(tmp_path / "parts")
    assert_same(weights(warm), weights(parts))
    assert warm.cursor == parts.cursor == {"row": 2 * (2 + 4 + 8)}
    lines = read_metrics(tmp_path / "warm/metrics.jsonl")
    assert [line["global_batch"] for line in lines] == [2, 2, 4, 4, 8, 8]
    assert lines[-1]["tokens"] == parts.tokens


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_resumed_warm_up_is_the_same_run(make_trainer, tmp_path, stop):
    straight = run(make_trainer(**WARM), tmp_path / "straight")
    first = make_trainer(**WARM, checkpoint_every=stop)
    while first.step < stop:
        first.train_step()
    first.save(tmp_path / "run")
    second = make_trainer(
        **WARM | {"micro_batch": 1}
    )  # as many rows in other micro-batches: the same steps but for rounding
    second.resume(first.saved)
    again = make_trainer(**WARM)
    again.resume(first.saved)
    while again.step < 6:
        again.train_step()
        second.train_step()
    assert_same(weights(straight), weights(again))
    assert straight.cursor == again.cursor == second.cursor
    for a, b in zip(weights(straight).values(), weights(second).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_rows_are_cut_as_the_step_has_them(make_trainer):
    trainer, told = make_trainer(), []
    trainer.config.data.seq_len_warmup = [[0, 4], [2, 8], [3, 16]]
    trainer.reader.cut_rows = told.append
    lines = [trainer.train_step() for _ in range(4)]
    assert told == [line["seq_len"] for line in lines] == [4, 4, 8, 16]


def test_mfu_counts_what_each_step_computes(monkeypatch):
    monkeypatch.setattr(gauge, "peak_flops", lambda device, precision: 1e9)
    model = ModelConfig(
        dim=64, layers=2, heads=2, vocab_size=128, window=64, memory=MemoryConfig(heads=2, chunk_size=16)
    )
    train = TrainConfig(micro_batch=1, global_batch=4, batch_warmup=[[0, 1], [2, 4]])
    config = Config(model=model, data=DataConfig(seq_len=64, seq_len_warmup=[[0, 16], [1, 64]]), train=train)
    read = Gauge(config, torch.device("cpu"), 1, corpus_tokens=0).read(0.5, [1, 2, 3], tokens=100)
    flops = 64 * model_flops(config, 16) + 64 * model_flops(config, 64) + 4 * 64 * model_flops(config, 64)
    assert model_flops(config, 16) < model_flops(config, 64)
    assert read == {"mfu": round(flops / 0.5 / 1e9, 4)}


def test_the_time_left_is_that_of_the_rows_left(monkeypatch, capsys):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    train = TrainConfig(micro_batch=2, **WARM)
    Progress(6, 0, 1, train.rows_until).update(1, 100, {"loss": 2.5, "lr": 1e-3, "grad_norm": 1.25})
    left = 2 + 4 + 4 + 8 + 8  # rows, at 10 seconds for two
    assert capsys.readouterr().out.rstrip().endswith(f"left {left * 5 // 60}:{left * 5 % 60:02}")
