"""What a rank did when, as a Chrome trace (chrome://tracing, Perfetto). Wall-clock of the host: meant for CPUs."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path


class Timeline:
    """Spans of work and of waiting, in seconds since the epoch. Off unless asked for."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.spans: list[tuple[str, str, float, float]] = []  # kind, name, start, end

    @contextlib.contextmanager
    def span(self, kind: str, name: str) -> Iterator[None]:
        """kind: "forward", "backward" or "wait"."""
        if not self.enabled:
            yield
            return
        start = time.time()
        try:
            yield
        finally:
            self.spans.append((kind, name, start, time.time()))


def idle_share(timelines: list[list[tuple[str, str, float, float]]]) -> float:
    """Share of ranks * (last end - first start) in which no rank computed. timelines: each rank's spans."""
    work = [s for spans in timelines for s in spans if s[0] != "wait"]
    whole = max(s[3] for s in work) - min(s[2] for s in work)
    return 1 - sum(end - start for _, _, start, end in work) / (whole * len(timelines))


def write_chrome_trace(path: Path, timelines: list[list[tuple[str, str, float, float]]]) -> None:
    """One row per rank."""
    origin = min(start for spans in timelines for _, _, start, _ in spans)
    events = [
        {
            "ph": "X",
            "pid": 0,
            "tid": rank,
            "cat": kind,
            "name": f"{kind} {name}",
            "ts": (start - origin) * 1e6,
            "dur": (end - start) * 1e6,
        }
        for rank, spans in enumerate(timelines)
        for kind, name, start, end in spans
    ]
    names = [
        {"ph": "M", "pid": 0, "tid": r, "name": "thread_name", "args": {"name": f"rank {r}"}}
        for r in range(len(timelines))
    ]
    path.write_text(json.dumps({"traceEvents": names + events}))
