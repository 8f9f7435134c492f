"""Ending all processes of a run when one is lost, or when none gets on, and saying which one it is."""

import contextlib
import json
import math
import os
import re
import sys
import threading
import time
import traceback
from contextlib import AbstractContextManager
from pathlib import Path

import torch.distributed as dist

from titans_pretrain.checkpoint.together import new_store
from titans_pretrain.training.hooks import Hook

HANG_EXIT_CODE = 86
_CONNECTION = re.compile("connection|timed? ?out|socket|nccl", re.IGNORECASE)
_GONE = -1  # a sign of life that says: I have ended well
_ENDS = 5.0  # seconds in which a process may end by itself, for the reason that ended another
_ANSWERS = 10.0  # seconds in which the processes of a run that hangs say where they are


class Watchdog(Hook):
    """Inside `with`, which all processes enter; needs the default process group.

    A killed process says nothing, and those that wait for it would wait until the timeout of their collective. So each leaves a sign
    of life in the group's store every second, and watches its neighbour's: one that is lost for `lost_after` seconds ends all, with
    exit code 1 and one line that says which it was.

    A process that hangs has a thread that still beats. Where no step, validation or checkpoint ended for `hang_after` seconds (None:
    never looked at), every process prints its stack, and all end with HANG_EXIT_CODE and one line that says which is behind, and in
    what call."""

    def __init__(self, lost_after: float, hang_after: float | None = None):
        self._lost_after, self._hang_after = lost_after, hang_after
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._main = threading.get_ident()
        self._step = 0
        self._moved = math.inf  # a start may take its time: there is no hang before the first step begins

    def __enter__(self) -> "Watchdog":
        if dist.is_initialized() and (dist.get_world_size() > 1 or self._hang_after):
            self._thread = threading.Thread(target=self._watch, args=(new_store("watchdog"),), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._error = error
        if self._thread is None:
            return
        if isinstance(error, RuntimeError) and _CONNECTION.search(str(error)):
            self._thread.join(self._lost_after + 5)  # a broken connection: it will find out whose and end this process
        self._stop.set()
        self._thread.join()

    def around_step(self, trainer) -> AbstractContextManager:
        self._moved = min(self._moved, time.monotonic())
        return contextlib.nullcontext()

    def after_step(self, trainer, line: dict) -> None:
        self._step, self._moved = trainer.step, time.monotonic()

    def after_save(self, trainer, checkpoint: Path) -> None:
        self._moved = time.monotonic()

    def after_validation(self, trainer, line: dict) -> None:
        self._moved = time.monotonic()

    def after_run(self, trainer) -> None:
        self._moved = math.inf  # an upload may take its time

    def _watch(self, store: dist.Store) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        watched = (rank + 1) % world
        beats, seen, since, last = 0, -1, time.monotonic(), time.monotonic()
        try:
            while not self._stop.wait(1.0):
                if time.monotonic() - last > 5.0:  # this process was stopped: the others had no chance to be seen
                    since, self._moved = time.monotonic(), max(self._moved, time.monotonic())
                last = time.monotonic()
                beats += 1
                store.set(f"{rank}", str(beats))
                if store.check(["lost"]) and not self._stop.wait(_ENDS):
                    self._end(store.get("lost").decode())
                if self._hang_after and (store.check(["hang"]) or last - self._moved > self._hang_after):
                    self._end_hang(store, rank, world)
                now = int(store.get(f"{watched}")) if store.check([f"{watched}"]) else 0
                if now == _GONE or now != seen:
                    seen, since = now, time.monotonic()
                if time.monotonic() - since > self._lost_after:
                    reason = f"rank {watched} gave no sign of life for {self._lost_after:.0f} s"
                    store.set("lost", reason)
                    self._end(reason)
            if self._error is None:
                store.set(f"{rank}", str(_GONE))
            else:
                store.set("lost", f"rank {rank} stopped: {self._error}")
        except dist.DistError as e:  # the process that holds the store is gone
            if not self._stop.is_set():
                self._end(f"the process that keeps the group's store (rank 0) is gone ({str(e).splitlines()[0]})")

    def _end_hang(self, store: dist.Store, rank: int, world: int) -> None:
        """Every process comes here, at most a second after the first."""
        store.set("hang", "1")
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        calls = [(frame.filename, frame.lineno, frame.name) for frame in stack]
        store.set(f"at {rank}", json.dumps({"step": self._step, "calls": calls}))
        whole = "".join(traceback.format_list(stack))
        print(f"rank {rank} at step {self._step + 1} hangs here:\n{whole}", file=sys.stderr, flush=True)
        deadline = time.monotonic() + _ANSWERS
        while time.monotonic() < deadline and not all(store.check([f"at {r}"]) for r in range(world)):
            time.sleep(0.2)
        places = {r: json.loads(store.get(f"at {r}")) if store.check([f"at {r}"]) else None for r in range(world)}
        time.sleep(1.0)  # rank 0 keeps the store: the others read it first
        self._end(f"no step was finished for {self._hang_after:.0f} s: {describe_hang(places)}", HANG_EXIT_CODE)

    def _end(self, reason: str, code: int = 1) -> None:
        print(
            f"error: {reason}; rank {dist.get_rank()} stopped too; the same command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(code)


def describe_hang(places: dict[int, dict | None]) -> str:
    """Which ranks are behind, and in what call. places: of each rank {"step", "calls": [(file, line, function), ...] from the outermost
    to the innermost}; None: it did not answer. Behind are those that do not answer, or else that do not wait for others, or else that
    are at the earliest step."""
    known = {r: place for r, place in places.items() if place is not None}
    silent = sorted(places.keys() - known.keys())
    if silent:
        return ", ".join(f"rank {r}" for r in silent) + " did not answer"
    busy = {r: p for r, p in known.items() if not _waits(p["calls"])}
    behind = busy or {r: p for r, p in known.items() if p["step"] == min(p["step"] for p in known.values())}
    told = "; ".join(
        f"rank {r} is behind, at step {p['step'] + 1} in {_call(p['calls'])}" for r, p in sorted(behind.items())[:3]
    )
    if len(behind) == len(known) > 1:
        told = f"all wait at step {min(p['step'] for p in known.values()) + 1}, rank 0 in {_call(known[0]['calls'])}"
    elif others := known.keys() - behind.keys():
        told += f"; {f'rank {min(others)} waits' if len(others) == 1 else 'the others wait'} in {_call(known[min(others)]['calls'])}"
    return told


def _waits(calls: list) -> bool:
    """Whether the call is one of torch.distributed."""
    return any("torch/distributed" in file.replace(os.sep, "/") for file, _, _ in calls[-4:])


def _call(calls: list) -> str:
    """The innermost call of this package, and what it called."""
    calls = [call for call in calls if not call[2].startswith("<")] or calls  # a comprehension has a frame of its own
    own = [i for i, (file, _, _) in enumerate(calls) if re.search(r"titans_pretrain|/(kernels|data_prep)/", file)]
    file, line, function = calls[own[-1] if own else -1]
    inner = f", calling {calls[own[-1] + 1][2]}" if own and own[-1] + 1 < len(calls) else ""
    return f"{function} ({os.sep.join(file.split(os.sep)[-2:])}, line {line}{inner})"
