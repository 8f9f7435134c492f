"""torch's profiler over steps of a run: those that the config names, and the next one whenever a signal asks."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from titans_pretrain.training.hooks import Hook

log = logging.getLogger(__name__)
SIGNAL = signal.SIGUSR2
ROWS = 30  # of the table


class Profiler(Hook):
    """Each process records itself, into RUN/profile/step-N-rank-R.json.gz (chrome://tracing, Perfetto) and a table beside it.

    steps: of the run, None: none. Inside `with`, SIGUSR2 asks for the step that begins next."""

    def __init__(self, run_dir: Path, steps: list[int] | None, rank: int = 0):
        self.folder, self.steps, self.rank = run_dir / "profile", set(steps or ()), rank
        self._asked, self._previous = False, None

    def __enter__(self) -> "Profiler":
        if threading.current_thread() is threading.main_thread():  # nobody else may handle signals
            self._previous = signal.signal(SIGNAL, self._ask)
        return self

    def __exit__(self, *error) -> None:
        if self._previous is not None:
            signal.signal(SIGNAL, self._previous)

    def _ask(self, number, frame) -> None:
        self._asked = True

    @contextlib.contextmanager
    def around_step(self, trainer) -> Iterator[None]:
        """What cannot be written is a warning."""
        number = trainer.step + 1
        if not (self._asked or number in self.steps):
            yield
            return
        self._asked = False
        with torch.profiler.profile(record_shapes=True) as profile:
            yield
        name = f"step-{number:08d}-rank-{self.rank}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self.folder / f"{name}.json.gz"))
            by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = profile.key_averages(group_by_input_shape=False).table(sort_by=by, row_limit=ROWS)
            (self.folder / f"{name}.txt").write_text(table + "\n")
        except (OSError, RuntimeError) as e:
            log.warning("the profile of step %d is not written: %s", number, e)
        else:
            log.warning("profile of step %d: %s", number, self.folder / f"{name}.txt")
