"""How long parts of a step take, without waiting for a device."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch


class Stopwatch:
    """Spans of the host's clock on a CPU; on a GPU, of the device's current stream: the time between two events in it, which are only
    noted down. So what a host does meanwhile counts as far as the device has to wait for it.

    on: whether anything is noted; for whoever calls `turn` now and then."""

    def __init__(self, device: torch.device):
        self._device, self.on = device, False
        self._spans: list[tuple[str, object, object]] = []
        self._before: list[tuple[str, object, object]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        start = self._mark()
        yield
        self._spans.append((name, start, self._mark()))

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, nothing is noted."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def turn(self) -> dict[str, float]:
        """Seconds by name, of the spans between the turn before the last and the last one. By now a device must be through with them."""
        total: dict[str, float] = defaultdict(float)
        for name, start, end in self._before:
            total[name] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
        self._before, self._spans = self._spans, []
        return dict(total)

    def _mark(self) -> object:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
