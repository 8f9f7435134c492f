"""The training loop: steps, validation, checkpoints, and when to stop."""

import contextlib
import logging
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
)
from titans_pretrain.checkpoint.saver import Saver
from titans_pretrain.config import Config
from titans_pretrain.data import Stopped
from titans_pretrain.training.engine import Engine
from titans_pretrain.training.gauge import Gauge
from titans_pretrain.training.guard import FINE, NOT_FINITE
from titans_pretrain.training.hooks import Hook
from titans_pretrain.training.loggers import Logger
from titans_pretrain.training.optimizer import learning_rate
from titans_pretrain.training.progress import Progress
from titans_pretrain.training.signals import StopRequest
from titans_pretrain.training.validation import Validator

log = logging.getLogger(__name__)
MOST_SKIPPED = 100  # steps in a row without an update, before a run stops
MOST_ROLLBACKS = 3  # likewise
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
        self.validation_loss: float | None = None  # then
        self.cursor = reader.state_dict()  # of the data after them
        self.hooks: list[Hook] = []
        self.saver = Saver(config.train.checkpoint_async)
        self.saved: Path | None = None  # the newest checkpoint that is whole
        self._stall = 0.0  # seconds that saving kept the training waiting, since the last step
        self.skipped = 0  # steps in a row without an update, up to now
        self.rollbacks = 0  # since the last update
        # Steps between looks at the loss. On a CPU it is at hand, and DeepSpeed waits for the device in every step anyway.
        self.read_every = 1 if device.type == "cpu" or config.parallel.zero_stage else config.train.log_every
        self._unread: list[dict] = []  # lines whose loss and gradient norm are still on the device
        self._goes_back = False  # a rollback is due
        self._unreported: list[dict] = []  # those that nobody has logged since they were read
        self._since, self._tokens_then = 0.0, 0  # when the first unread step began, and `tokens` then

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
        self.saved, self.skipped = checkpoint, trainer.get("skipped", 0)
        for hook in self.hooks:
            if hook.name in trainer.get("hooks", {}):
                hook.load_state_dict(trainer["hooks"][hook.name])
        if "guard" in trainer:
            try:
                engine.guard.load_state_dict(trainer["guard"])
            except ValueError as e:
                raise DamagedCheckpoint(f"{checkpoint / 'trainer.json'} is damaged: {e}") from e

    def start_from(self, checkpoint: Path) -> None:
        """Starts with the weights of a checkpoint, whose files have been checked, and with nothing else of it."""
        engine = self.engine
        load_initial(checkpoint, engine.model, engine.optimizer, engine.tensor_group, engine.data_group, checked=True)

    def run(self, run_dir: Path, loggers: Sequence[Logger], progress: Progress | None, stop: StopRequest) -> bool:
        """Trains up to `train.steps` or a stop request, then saves; whether all is done. Raises ValueError on a loss that
        is not finite."""
        train = self.config.train
        try:
            self.saver.start(run_dir)
            while not self.engine.any(stop.received is not None or self.saver.failed):
                if self._validation_is_due():
                    self._report(loggers, progress)
                    self._validate(loggers, progress, stop)
                    continue  # and not further if a stop request cut it short
                if _due(self.step, train.checkpoint_every):
                    self._report(loggers, progress)
                    self.save(run_dir, loggers)
                if self.step >= train.steps:
                    break
                with contextlib.ExitStack() as around:
                    for hook in self.hooks:
                        around.enter_context(hook.around_step(self))
                    trained = self.train_step()
                if trained is None:
                    continue  # a stop request came before the rows did
                if _due(self.step, self.read_every):
                    self._report(loggers, progress)
            self._report(loggers, progress)
            self.save(run_dir, loggers)
            self._settle()
            for hook in self.hooks:
                hook.after_run(self)
        except Exception as error:
            self._report(loggers, progress)
            for hook in self.hooks:
                hook.on_error(self, error)
            raise
        return self.step >= train.steps and not self._validation_is_due()

    def train_step(self) -> dict | None:
        """One optimizer step. Returns the numbers to log, with the loss and the gradient norm as tensors on
        the device until `read`; None, with nothing done, where a stop request came while some process waited for its rows."""
        if not self._unread:
            self._since, self._tokens_then = time.perf_counter(), self.tokens
        drawn = self._draw()
        if drawn is None:
            return None
        batches, targets, waited = drawn
        rate = learning_rate(self.step + 1, self.config.train)
        loss = self.engine.forward_backward(batches, targets)
        grad_norm = self.engine.update(rate, loss)
        self.step += 1
        self.tokens += targets
        self.cursor = self.reader.state_dict()
        values = {
            "step": self.step,
            "loss": loss,
            "tokens": self.tokens,
            "tokens_per_second": None,
            "lr": rate,
            "grad_norm": grad_norm,
            "skipped": self.engine.guard.verdict,
            "data_wait": round(waited, 4),
            "peak_memory_mib": round(peak_memory_mib(self.device), 1),
        }
        if self._stall:
            values["checkpoint_stall"], self._stall = round(self._stall, 4), 0.0
        values |= self.config.warming(self.step - 1)
        for hook in self.hooks:
            hook.after_step(self, values)
        self._unread.append(values)
        if self.read_every == 1:
            self.read()
        return values

    def read(self) -> None:
        """Fetches the numbers of the steps since the last call, in one transfer. Their speed is that of all of them together.

        Raises ValueError for the first step that is to stop the run; the weights are those of the step before."""
        if not self._unread:
            return
        lines, self._unread = self._unread, []
        names = ("loss", "grad_norm", "skipped")
        numbers = torch.stack([line[name].to(self.device).double() for line in lines for name in names]).tolist()
        seconds = time.perf_counter() - self._since
        speed = round((self.tokens - self._tokens_then) / seconds, 1)
        for i, line in enumerate(lines):
            loss, grad_norm, verdict = numbers[3 * i : 3 * i + 3]
            line |= {"loss": loss, "grad_norm": grad_norm, "skipped": int(verdict), "tokens_per_second": speed}
            self.skipped = 0 if verdict == FINE else self.skipped + 1
            if verdict != FINE and (self._action(verdict) == "stop" or self.skipped > MOST_SKIPPED):
                self._settle()  # all processes come here: a checkpoint that is being written is not lost
                raise ValueError(self._harmful(line))
            if verdict != FINE and self._action(verdict) == "rollback":
                self._goes_back = self.skipped >= self.config.train.rollback_after
            if verdict == FINE:
                self.rollbacks = 0
                del line["skipped"]
            if self.gauge:
                line |= self.gauge.read(seconds, [x["step"] for x in lines], line["tokens"])
            self._unreported.append(line)

    def _report(self, loggers: Sequence[Logger], progress: Progress | None) -> None:
        """Logs the steps since the last report; those before one that stops the run, too. Then goes back, if they are to be undone."""
        try:
            self.read()
        finally:
            lines, self._unreported = self._unreported, []
            for line in lines:
                _log(loggers, line)
            if lines and progress is not None:
                progress.update(lines[-1]["step"], self.tokens - self._tokens_then, lines[-1])
                for line in lines:
                    if "skipped" in line:
                        progress.note(f"step {line['step']}: {_told(line)}; no update was made")
        if self._goes_back:
            self._roll_back(loggers, progress)

    def _roll_back(self, loggers: Sequence[Logger], progress: Progress | None) -> None:
        """Takes weights and optimizer from the newest checkpoint. The data goes on after the rows that did harm, and so do the steps."""
        self._settle()
        self._goes_back, self.rollbacks = False, self.rollbacks + 1
        if self.saved is None or self.rollbacks > MOST_ROLLBACKS:
            why = (
                "there is no checkpoint to go back to"
                if self.saved is None
                else f"{MOST_ROLLBACKS} rollbacks did not help"
            )
            raise ValueError(
                f"step {self.step}: {self.skipped} steps in a row made no update, and {why}; {self._advice()}"
            )
        engine = self.engine
        found = load_checkpoint(self.saved, engine.model, engine.optimizer, engine.tensor_group, engine.data_group)
        self.skipped = 0
        _log(loggers, {"step": self.step, "tokens": self.tokens, "rolled_back_to": found["step"]})
        if progress is not None:
            progress.note(f"step {self.step}: back to the weights of {self.saved}; the data goes on from here")

    def _draw(self) -> tuple[list, int, float] | None:
        """Batches of one step, their targets, and seconds spent waiting for them; None if a process stops.

        The loss is a sum over the targets of the whole step, divided by their number: rows with more padding do not weigh
        more, and the split into micro-batches does not matter."""
        waited, train, data = 0.0, self.config.train, self.config.data
        micro_batches = self.engine.micro_batches * train.batch_at(self.step) // train.global_batch
        if data.seq_len_warmup:
            self.reader.cut_rows(data.length_at(self.step))
        for _ in range(EMPTY_DRAWS):  # rows of padding alone come from shards that are skipped: others follow
            start = time.perf_counter()
            batches = []
            with contextlib.suppress(Stopped):
                batches += [next(self.reader) for _ in range(micro_batches)]
            waited += time.perf_counter() - start
            if self.engine.any(not batches):
                return None
            if targets := self.engine.count(batches):
                return batches, targets, waited
        skipped = ", ".join(getattr(self.reader, "skipped", {}))
        cause = f"cannot be read: {skipped}" if skipped else f"is data.seq_len={data.seq_len} too small?"
        raise ValueError(f"step {self.step + 1}: the batch holds no target, nor do {EMPTY_DRAWS} in a row; {cause}")

    def _validation_is_due(self) -> bool:
        train = self.config.train
        due = self.step == train.steps or _due(self.step, train.eval_every)
        return self.validator is not None and due and self.validated < self.step

    def _validate(self, loggers: Sequence[Logger], progress: Progress | None, stop: StopRequest) -> None:
        found = self.validator.run(self.engine, stop)
        if found is not None:
            self.validated, self.validation_loss = self.step, found["validation_loss"]
            line = {"step": self.step, "tokens": self.tokens, **found}
            _log(loggers, line)
            for hook in self.hooks:
                hook.after_validation(self, line)
            if progress is not None:
                progress.note(f"step {self.step}: validation loss {found['validation_loss']:.4f}")

    def save(self, run_dir: Path, loggers: Sequence[Logger] = ()) -> None:
        """Writes a checkpoint of this step, unless there is one, or begins to (see Saver); first the one before is waited for. Raises
        ValueError as `read` does: none is of a step that is not finite."""
        self.read()
        start = time.perf_counter()
        self._settle()
        if self.step == 0 or (self.saved and self.saved.name == checkpoint_name(self.step)):
            return
        for logger in loggers:
            try:
                logger.flush()
            except OSError as e:  # lines that may not survive a power cut are no reason to go without a checkpoint
                log.warning("cannot flush the metrics: %s", e)
        numbers = {"step": self.step, "tokens": self.tokens, "validated": self.validated}
        numbers["reader"] = self.cursor
        if self.validated == self.step and self.validation_loss is not None:
            numbers["validation_loss"] = self.validation_loss
        engine = self.engine
        if states := {hook.name: hook.state_dict() for hook in self.hooks if hook.name is not None}:
            numbers["hooks"] = states
        if self.skipped:
            numbers["skipped"] = self.skipped
        if self.config.train.on_spike != "ignore":
            numbers["guard"] = engine.guard.state_dict()
        self.saver.save(run_dir, self.config, engine.model, engine.optimizer, numbers, engine.tensor_group)
        if not self.config.train.checkpoint_async:
            self._settle()
        self._stall += time.perf_counter() - start

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written."""
        if (written := self.saver.wait()) is not None:
            self.saved = written
            for hook in self.hooks:
                hook.after_save(self, written)

    def _action(self, verdict: float) -> str:
        return self.config.train.on_nan if verdict == NOT_FINITE else self.config.train.on_spike

    def _harmful(self, line: dict) -> str:
        kept = f"the last good checkpoint is {self.saved}" if self.saved else "no checkpoint was written yet"
        in_a_row = "" if self.skipped <= MOST_SKIPPED else f", as {MOST_SKIPPED} steps before it"
        return f"step {line['step']}: {_told(line)}{in_a_row}; stopped before the update, {kept}. {self._advice()}"

    def _advice(self) -> str:
        train = self.config.train
        return (
            f"Try a lower train.lr (now {train.lr:g}), more train.warmup_steps (now {train.warmup_steps}), "
            f"a lower model.memory.max_lr (now {self.config.model.memory.largest_lr:g}) or train.precision=fp32"
        )


def _told(line: dict) -> str:
    far = "" if line["skipped"] == NOT_FINITE else ", far above the steps before"
    return f"the loss is {line['loss']}, the gradient norm {line['grad_norm']}{far}"


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
