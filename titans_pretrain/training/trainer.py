"""The training loop: steps, validation, checkpoints, and when to stop."""

import contextlib
import logging
import math
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from titans_pretrain.checkpoint import (
    DamagedCheckpoint,
    checkpoint_name,
    load_checkpoint,
    load_initial,
    save_checkpoint,
)
from titans_pretrain.config import Config
from titans_pretrain.data import Stopped
from titans_pretrain.training.engine import Engine
from titans_pretrain.training.gauge import Gauge
from titans_pretrain.training.loggers import Logger
from titans_pretrain.training.optimizer import learning_rate
from titans_pretrain.training.progress import Progress
from titans_pretrain.training.signals import StopRequest
from titans_pretrain.training.validation import Validator

log = logging.getLogger(__name__)
EMPTY_DRAWS = 1000  # steps whose rows hold no target, one after the other, before a run stops


class Trainer:
    """Trains one model. With several processes, one trainer runs on each, in step; only one of them has loggers.

    reader: an endless iterator of Batch(tokens, labels, positions), int64 each: this process's rows and columns of a
    micro-batch, with state_dict() and load_state_dict(). Everything that decides a future step is the model, the optimizer, the
    random states, the reader's cursor and `step`: a checkpoint holds exactly these, so a resumed run is the same run.
    """

    gauge: Gauge | None = None  # adds numbers to a step's line

    def __init__(self, config: Config, engine: Engine, reader, validator: Validator | None, device: torch.device):
        self.config, self.engine, self.reader, self.validator, self.device = config, engine, reader, validator, device
        self.step = 0  # finished optimizer steps
        self.tokens = 0  # targets trained on in them
        self.validated = 0  # the last step that was validated
        self.cursor = reader.state_dict()  # of the data after them
        self.saved: Path | None = None  # the newest checkpoint

    def resume(self, checkpoint: Path, data: bool = True) -> None:
        """Goes on from a checkpoint of this model, whose files have been checked. data: where it stopped reading; else this data
        from the start."""
        engine = self.engine
        trainer = load_checkpoint(
            checkpoint, engine.model, engine.optimizer, engine.tensor_group, engine.data_group, checked=True
        )
        if data:
            try:
                self.reader.load_state_dict(trainer["reader"])
            except (KeyError, TypeError, AttributeError) as e:
                raise DamagedCheckpoint(
                    f"{checkpoint / 'trainer.json'} is damaged: its data cursor is none ({e!r})"
                ) from e
            except ValueError as e:
                raise ValueError(
                    f"{e}; for a second stage on other data give a new run.dir and train.init_from={checkpoint} (the weights), "
                    f"or train.resume={checkpoint} train.resume_data=false (the optimizer and the step too)"
                ) from e
        self.cursor = self.reader.state_dict()
        self.step, self.tokens, self.validated = trainer["step"], trainer["tokens"], trainer["validated"]
        self.saved = checkpoint

    def start_from(self, checkpoint: Path) -> None:
        """Starts with the weights of a checkpoint, whose files have been checked, and with nothing else of it."""
        engine = self.engine
        load_initial(checkpoint, engine.model, engine.optimizer, engine.tensor_group, engine.data_group, checked=True)

    def run(self, run_dir: Path, loggers: Sequence[Logger], progress: Progress | None, stop: StopRequest) -> bool:
        """Trains up to `train.steps` or a stop request, then saves; whether all is done. Raises ValueError on a loss that
        is not finite."""
        train = self.config.train
        while not self.engine.any(stop.received is not None):
            if self._validation_is_due():
                self._validate(loggers, progress, stop)
                continue  # and not further if a stop request cut it short
            if _due(self.step, train.checkpoint_every):
                self.save(run_dir, loggers)
            if self.step >= train.steps:
                break
            before = self.tokens
            values = self.train_step()
            if values is None:
                continue  # a stop request came before the rows did
            if progress is not None:
                progress.update(self.step, self.tokens - before, values)
            _log(loggers, values)
        self.save(run_dir, loggers)
        return self.step >= train.steps and not self._validation_is_due()

    def train_step(self) -> dict | None:
        """One optimizer step over `global_batch` rows. Returns the numbers to log; None, with nothing done, where a stop request
        came while some process waited for its rows."""
        train, start = self.config.train, time.perf_counter()
        drawn = self._draw()
        if drawn is None:
            return None
        batches, targets, waited = drawn
        loss = self.engine.forward_backward(batches, targets)
        if not math.isfinite(loss):
            raise ValueError(self._not_finite(loss, math.nan))
        rate = learning_rate(self.step + 1, train)
        grad_norm = self.engine.update(rate)
        if not math.isfinite(grad_norm):
            raise ValueError(self._not_finite(loss, grad_norm))
        self.step += 1
        self.tokens += targets
        self.cursor = self.reader.state_dict()
        return {
            "step": self.step,
            "loss": loss,
            "tokens": self.tokens,
            "tokens_per_second": round(targets / (time.perf_counter() - start), 1),
            "lr": rate,
            "grad_norm": grad_norm,
            "data_wait": round(waited, 4),
            "peak_memory_mib": round(peak_memory_mib(self.device), 1),
            **(self.gauge.read(time.perf_counter() - start, self.tokens) if self.gauge else {}),
        }

    def _draw(self) -> tuple[list, int, float] | None:
        """Batches of one step, their targets, and seconds spent waiting for them; None if a process stops.

        The loss is a sum over the targets of the whole step, divided by their number: rows with more padding do not weigh
        more, and the split into micro-batches does not matter."""
        waited = 0.0
        for _ in range(EMPTY_DRAWS):  # rows of padding alone come from shards that are skipped: others follow
            start = time.perf_counter()
            batches = []
            with contextlib.suppress(Stopped):
                batches += [next(self.reader) for _ in range(self.engine.micro_batches)]
            waited += time.perf_counter() - start
            if self.engine.any(not batches):
                return None
            if targets := self.engine.count(batches):
                return batches, targets, waited
        skipped = ", ".join(getattr(self.reader, "skipped", {}))
        cause = f"cannot be read: {skipped}" if skipped else f"is data.seq_len={self.config.data.seq_len} too small?"
        raise ValueError(f"step {self.step + 1}: the batch holds no target, nor do {EMPTY_DRAWS} in a row; {cause}")

    def _validation_is_due(self) -> bool:
        train = self.config.train
        due = self.step == train.steps or _due(self.step, train.eval_every)
        return self.validator is not None and due and self.validated < self.step

    def _validate(self, loggers: Sequence[Logger], progress: Progress | None, stop: StopRequest) -> None:
        found = self.validator.run(self.engine, stop)
        if found is not None:
            self.validated = self.step
            _log(loggers, {"step": self.step, "tokens": self.tokens, **found})
            if progress is not None:
                progress.note(f"step {self.step}: validation loss {found['validation_loss']:.4f}")

    def save(self, run_dir: Path, loggers: Sequence[Logger] = ()) -> None:
        """Writes a checkpoint of this step, unless there is one."""
        if self.step == 0 or (self.saved and self.saved.name == checkpoint_name(self.step)):
            return
        for logger in loggers:
            try:
                logger.flush()
            except OSError as e:  # lines that may not survive a power cut are no reason to go without a checkpoint
                log.warning("cannot flush the metrics: %s", e)
        numbers = {"step": self.step, "tokens": self.tokens, "validated": self.validated}
        numbers["reader"] = self.cursor
        engine = self.engine
        self.saved = save_checkpoint(run_dir, self.config, engine.model, engine.optimizer, numbers, engine.tensor_group)

    def _not_finite(self, loss: float, grad_norm: float) -> str:
        train = self.config.train
        kept = f"the last good checkpoint is {self.saved}" if self.saved else "no checkpoint was written yet"
        return (
            f"step {self.step + 1}: the loss is {loss}, the gradient norm {grad_norm}; stopped before the update, {kept}. "
            f"Try a lower train.lr (now {train.lr:g}), more train.warmup_steps (now {train.warmup_steps}), "
            f"a lower model.memory.max_lr (now {self.config.model.memory.largest_lr:g}) or train.precision=fp32"
        )


def peak_memory_mib(device: torch.device) -> float:
    """Of the device's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _log(loggers: Sequence[Logger], values: dict) -> None:
    for logger in loggers:
        logger.log(values)
