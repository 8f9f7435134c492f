"""The loop on stubs: what a step computes, what stops it, what it leaves on disk."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest
import torch

from titans_pretrain.checkpoint import latest_checkpoint
from titans_pretrain.data import Stopped
from titans_pretrain.training.loggers import JsonlLogger, read_metrics
from titans_pretrain.training.progress import Progress, format_seconds
from titans_pretrain.training.signals import StopRequest


def run(trainer, run_dir, stop=None):
    run_dir.mkdir(exist_ok=True)
    logger = JsonlLogger(run_dir / "metrics.jsonl", trainer.step, trainer.validated)
    progress = Progress(trainer.config.train.steps, trainer.step, 1)
    trainer.run(run_dir, [logger], progress, stop or StopRequest())
    logger.close()
    return trainer


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.engine.model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_step_equals_plain_adamw_on_the_whole_batch(make_trainer):
    """Accumulated micro-batches with unequal numbers of labels equal one batch, down to the gradient norm."""
    accumulated, whole = make_trainer(micro_batch=1, grad_clip=0.01), make_trainer(micro_batch=4, grad_clip=0.01)
    for _ in range(3):
        a, b = accumulated.train_step(), whole.train_step()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["grad_norm"] > 0.01  # so that clipping did something
        assert a["tokens"] == b["tokens"]
    for x, y in zip(weights(accumulated).values(), weights(whole).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_the_update_is_torch_adamw(make_trainer):
    trainer, twin = make_trainer(grad_clip=0.0, warmup_steps=4), make_trainer()
    batches = [next(twin.reader) for _ in range(2)]
    targets = sum(int((b.labels != -100).sum()) for b in batches)
    loss = sum(twin.engine.model(b.tokens, labels=b.labels, num_items_in_batch=targets).loss for b in batches)
    loss.backward()
    expected = torch.optim.AdamW(
        [
            {"params": [twin.engine.model.hidden.weight], "weight_decay": 0.1},
            {"params": [twin.engine.model.embed_tokens.weight, twin.engine.model.hidden.bias], "weight_decay": 0.0},
        ],
        lr=1e-2 / 4,
        betas=(0.9, 0.95),
    )
    expected.step()
    assert trainer.train_step()["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for x, y in zip(weights(trainer).values(), weights(twin).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("grad_clip", "expected"), [(0.25, 0.25), (1e3, None), (0.0, None)])
def test_gradients_are_clipped_to_the_global_norm(make_trainer, grad_clip, expected):
    trainer = make_trainer(grad_clip=grad_clip)
    seen = []
    trainer.engine.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: seen.append(
            torch.stack([p.grad.norm() for group in optimizer.param_groups for p in group["params"]]).norm().item()
        )
    )
    logged = trainer.train_step()["grad_norm"]
    assert logged > 0.25
    assert seen == [pytest.approx(expected or logged, rel=1e-4)]


def test_resuming_gives_the_same_weights_and_metrics_bit_for_bit(make_trainer, tmp_path):
    straight = run(make_trainer(steps=6, validate=True, eval_every=2), tmp_path / "straight")
    first = make_trainer(steps=6, validate=True, eval_every=2, checkpoint_every=3)
    run(first, tmp_path / "resumed")  # to the end, so that the lines of steps 4-6 must be dropped
    second = make_trainer(steps=6, validate=True, eval_every=2)
    torch.manual_seed(99)  # whatever state the process starts in
    second.resume(tmp_path / "resumed/checkpoints/step-00000003")
    assert second.step == 3
    run(second, tmp_path / "resumed")
    assert_same(weights(straight), weights(second))

    def comparable(folder):
        lines = read_metrics(tmp_path / folder / "metrics.jsonl")
        return [
            {
                k: v
                for k, v in line.items()
                if k not in ("tokens_per_second", "data_wait", "checkpoint_stall", "peak_memory_mib")
            }
            for line in lines
        ]

    assert comparable("straight") == comparable("resumed")
    assert [line["step"] for line in comparable("resumed")] == [1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_a_checkpoint_restores_the_random_states(make_trainer, tmp_path):
    import random

    import numpy

    def draw():
        return torch.rand(3).tolist(), numpy.random.rand(3).tolist(), random.random()

    trainer = make_trainer()
    trainer.train_step()
    draw()  # so that no generator stands where a fresh trainer leaves it
    trainer.save(tmp_path)
    expected = draw()
    make_trainer().resume(trainer.saved)
    assert draw() == expected


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_with_one_line_and_keeps_the_checkpoint(make_trainer, tmp_path, where):
    trainer = make_trainer(steps=6, checkpoint_every=2)
    forward = trainer.engine.model.forward

    def poisoned(*args, **kwargs):
        out = forward(*args, **kwargs)
        if trainer.step == 3:
            if where == "loss":
                out.loss = out.loss * torch.nan
            else:
                out.loss.register_hook(lambda g: g * torch.inf)
        return out

    trainer.engine.model.forward = poisoned
    with pytest.raises(
        ValueError, match="step 4: the loss is .*last good checkpoint is .*step-00000002.*lower train.lr"
    ) as e:
        run(trainer, tmp_path)
    assert "\n" not in str(e.value)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    healthy = make_trainer()
    healthy.resume(latest_checkpoint(tmp_path))
    assert healthy.step == 2
    assert all(torch.isfinite(w).all() for w in weights(healthy).values())


def test_a_batch_without_targets_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.reader._draw = lambda row: (torch.zeros(16, dtype=torch.int64), torch.full((16,), -100))
    with pytest.raises(ValueError, match="step 1: the batch holds no target"):
        trainer.train_step()


def test_rows_without_targets_are_passed_over(make_trainer):
    """As where shards are skipped: the next step's rows are drawn, and the cursor goes past them."""
    trainer, twin = make_trainer(), make_trainer()
    draw = trainer.reader._draw
    nothing = torch.zeros(16, dtype=torch.int64), torch.full((16,), -100)
    trainer.reader._draw = lambda row: nothing if row < 8 else draw(row)
    twin.reader.row = 8
    assert trainer.train_step()["loss"] == twin.train_step()["loss"]
    assert trainer.cursor == {"row": 12}


def test_a_stop_while_rows_are_waited_for_saves_the_steps_before_it(make_trainer, tmp_path):
    """The step is given up; its rows come again."""
    straight = run(make_trainer(steps=6), tmp_path / "straight")
    trainer = make_trainer(steps=6, checkpoint_every=0)
    draw = trainer.reader._draw

    def waiting(row):
        if row == 14:  # the second micro-batch of the fourth step
            os.kill(os.getpid(), signal.SIGTERM)
            raise Stopped
        return draw(row)

    trainer.reader._draw = waiting
    with StopRequest() as stop:
        run(trainer, tmp_path / "run", stop)
    assert trainer.step == 3
    resumed = make_trainer(steps=6)
    resumed.resume(latest_checkpoint(tmp_path / "run"))
    assert_same(weights(straight), weights(run(resumed, tmp_path / "run")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_stops(make_trainer, tmp_path, number):
    trainer = make_trainer(steps=6, checkpoint_every=0)
    step = trainer.train_step

    def interrupted():
        if trainer.step == 2:
            os.kill(os.getpid(), number)
        return step()

    trainer.train_step = interrupted
    before = signal.getsignal(number)
    with StopRequest() as stop:
        run(trainer, tmp_path, stop)
    assert stop.received == number
    assert trainer.step == 3
    assert latest_checkpoint(tmp_path).name == "step-00000003"
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("waiting", [False, True], ids=["reading", "waiting"])
def test_a_signal_during_a_validation_puts_it_off(make_trainer, tmp_path, waiting):
    """Also while its rows are on their way. The next process runs it first, and its line stands in the metrics once."""
    straight = run(make_trainer(steps=4, validate=True, eval_every=2), tmp_path / "straight")
    interrupted = make_trainer(steps=4, validate=True, eval_every=2)
    validation_reader = interrupted.validator.reader
    draw = validation_reader._draw

    def signalled(row):
        os.kill(os.getpid(), signal.SIGTERM)
        if waiting:
            raise Stopped
        return draw(row)

    validation_reader._draw = signalled
    with StopRequest() as stop:
        run(interrupted, tmp_path / "run", stop)
    assert interrupted.step == 2
    for _ in range(2):  # the second time as after a kill -9: from the same checkpoint, with lines after it
        resumed = make_trainer(steps=4, validate=True, eval_every=2)
        resumed.resume(tmp_path / "run/checkpoints/step-00000002")
        run(resumed, tmp_path / "run")
    assert_same(weights(straight), weights(resumed))
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [(line["step"], "loss" in line) for line in lines] == [
        (1, True), (2, True), (2, False), (3, True), (4, True), (4, False),
    ]  # fmt: skip


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_answered_at_once_and_ctrl_c_after_it_stops_at_once(capfd, first):
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), first)
        told = f"\n{first.name}: finishes this step and saves a checkpoint; Ctrl-C now stops at once, without one\n"
        assert capfd.readouterr().err == told
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == first  # said once, and the first one is what stopped the run
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_a_signal_is_taken_where_nobody_listens(monkeypatch):
    monkeypatch.setattr(os, "write", lambda *args: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM


def test_metrics_that_cannot_be_flushed_do_not_keep_a_checkpoint_from_being_written(make_trainer, tmp_path, caplog):
    class Full:
        def flush(self):
            raise OSError(122, "Disk quota exceeded")

    trainer = make_trainer()
    trainer.train_step()
    trainer.save(tmp_path, [Full()])
    assert latest_checkpoint(tmp_path) == trainer.saved
    assert "cannot flush the metrics" in caplog.text


def test_validation_is_the_mean_over_targets_and_always_the_same_rows(make_trainer):
    trainer = make_trainer(validate=True, eval_every=1, eval_batches=3)
    found = trainer.validator.run(trainer.engine)
    assert trainer.validator.run(trainer.engine) == found
    trainer.validator.reader.load_state_dict({"row": 0})
    batches = [next(trainer.validator.reader) for _ in range(3)]
    tokens, labels = (torch.cat([getattr(b, name) for b in batches]) for name in ("tokens", "labels"))
    assert found["validation_loss"] == pytest.approx(trainer.engine.model(tokens, labels=labels).loss.item(), rel=1e-6)
    assert found["validation_tokens"] == int((labels != -100).sum())


def test_only_the_newest_checkpoints_stay(make_trainer, tmp_path):
    run(make_trainer(steps=6, checkpoint_every=1, keep_checkpoints=2), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000005", "step-00000006"]


def test_every_line_of_the_metrics_is_whole(make_trainer, tmp_path):
    run(make_trainer(steps=3, validate=True, eval_every=3), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = {"step", "loss", "tokens", "tokens_per_second", "lr", "grad_norm", "data_wait", "peak_memory_mib"}
    assert [set(line) for line in lines[:3]] == [names] * 3
    assert set(lines[3]) == {"step", "tokens", "validation_loss", "validation_perplexity", "validation_tokens"}


def test_a_cut_off_last_line_is_dropped_on_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    JsonlLogger(tmp_path / "metrics.jsonl", step=2, validated=2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_plain_progress_lines(capsys):
    progress = Progress(steps=4, done=0, log_every=3)
    for step in range(1, 5):
        progress.update(step, 100, {"loss": 2.5, "lr": 1e-3, "grad_norm": 1.25})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 3/4", "step 4/4"]
    assert "loss 2.5000" in lines[0]
    assert lines[-1].endswith("left 0:00")
    assert format_seconds(3725) == "1:02:05"


@pytest.mark.parametrize(("rows", "columns"), [(30, 120), (0, 0)])
def test_a_terminal_gets_a_bar_and_one_without_a_size_gets_lines(rows, columns):
    """In a process whose standard error is a terminal of that size."""
    code = (
        "import logging\nfrom titans_pretrain.training.progress import Progress\nlogging.basicConfig(format='%(message)s')\n"
        "progress = Progress(steps=2, done=0, log_every=1)\nlogging.warning('a warning')\n"
        "for step in (1, 2):\n"
        "    progress.update(step, 100, {'loss': 2.5, 'lr': 1e-3, 'grad_norm': 1.25})\n"
        "progress.note('told')\nprogress.close()"
    )
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    out = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=terminal, check=True, text=True
    ).stdout
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # EIO once all is read
        while part := os.read(main, 4096):
            shown += part
    os.close(main)
    if columns:
        assert b"2/2 [" in shown
        assert b"loss 2.5000, " in shown
        assert b"tokens/s" in shown
        assert b"\ra warning\r\n" in re.sub(rb" +|\x1b\[A", b"", shown).replace(
            b"awarning", b"a warning"
        )  # on a line of its own
        assert out == "told\n"
    else:
        assert shown == b"a warning\r\n"
        assert [line[:8] for line in out.splitlines()] == ["step 1/2", "step 2/2", "told"]
