"""A request to stop that lets the current step finish."""

import contextlib
import os
import signal
from types import FrameType
from typing import Self

INTERRUPTED_EXIT_CODE = 85  # a checkpoint was saved; the same command goes on from it
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Inside `with`, a signal sets `received`, and the first process says so; SIGINT (Ctrl-C) after it stops at once."""

    def __init__(self):
        self.received: signal.Signals | None = None
        self._previous: dict = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None and os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            told = f"\n{name}: finishes this step and saves a checkpoint; Ctrl-C now stops at once, without one\n"
            with contextlib.suppress(OSError):  # nobody listens
                os.write(2, told.encode())  # not print: the signal may have come in the middle of one
        self.received = self.received or signal.Signals(number)
