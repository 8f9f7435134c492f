"""The processes of a run: joining them, seeing that they agree, and ending all when one is lost."""

import gc
import os
import re
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

LOST_AFTER = 15.0  # seconds without a sign of life
_CONNECTION = re.compile("connection|timed? ?out|socket|nccl", re.IGNORECASE)


def launched_world() -> int:
    """Processes of this run, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_processes(device: torch.device, timeout_minutes: float) -> None:
    """The default process group: NCCL on GPUs, gloo on CPUs."""
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=timeout_minutes)
    if launched_world() == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


def leave_processes() -> None:
    """Ends the process group. Without it, and with an engine alive, a process sometimes aborts at its exit."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def check_agreement(what: dict[str, object]) -> None:
    """Raises ValueError, on every process, if `what` differs between them; it names the first key that does."""
    if not dist.is_initialized():
        return
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, what)
    for rank, other in enumerate(found):
        for key in sorted(found[0].keys() | other.keys()):
            if found[0].get(key) != other.get(key):
                raise ValueError(
                    f"the processes were not started alike: {key} is {found[0].get(key)!r} on rank 0 and "
                    f"{other.get(key)!r} on rank {rank}; give every process the same config, overrides and run folder"
                )


class Watchdog:
    """Ends this process when another one is lost, with one line that says which. Inside `with`; needs the default process group.

    A killed process says nothing, and those that wait for it would wait until the timeout of their collective. So each
    leaves a sign of life in the group's store every second, and watches its neighbour's."""

    def __init__(self, lost_after: float = LOST_AFTER):
        self._lost_after = lost_after
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if dist.is_initialized() and dist.get_world_size() > 1:
            store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store().clone())
            self._thread = threading.Thread(target=self._watch, args=(store,), daemon=True)
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

    def _watch(self, store: dist.Store) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        watched = (rank + 1) % world
        beats, seen, since = 0, -1, time.monotonic()
        try:
            while not self._stop.wait(1.0):
                beats += 1
                store.set(f"{rank}", str(beats))
                if store.check(["lost"]) and not self._stop.wait(5.0):  # this process may be ending for the same reason
                    self._end(store.get("lost").decode())
                now = int(store.get(f"{watched}")) if store.check([f"{watched}"]) else 0
                if now == _GONE or now != seen:
                    seen, since = now, time.monotonic()
                if now != _GONE and time.monotonic() - since > self._lost_after:
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

    def _end(self, reason: str) -> None:
        print(
            f"error: {reason}; rank {dist.get_rank()} stopped too; the same command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


_GONE = -1  # a sign of life that says: I have ended well
