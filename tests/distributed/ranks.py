"""Gloo ranks that stay up over many cases, forked from one process that has imported all: megatron-core and DeepSpeed take seconds."""

import contextlib
import gc
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

FOLDER = Path(__file__).parent
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{FOLDER.parents[1]}:{FOLDER}"}


def forked(f: Callable, *args) -> multiprocessing.process.BaseProcess:
    """A running process f(*args)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    process = context.Process(target=f, args=args, daemon=True)
    with mock.patch.dict(os.environ, _ENVIRONMENT):  # of the server, at the first of all
        process.start()
    return process


class RankFailure(AssertionError):
    """A rank raised, died or did not answer; every rank has been stopped."""


class Ranks:
    """`world` processes of one gloo group. run(f, *args) calls f(*args) on each and returns the answers in order."""

    def __init__(self, world: int, folder):
        self.world = world
        store = folder / f"store-{world}-{time.time_ns()}"
        self._pipes, self._processes = [], []
        for rank in range(world):
            ours, theirs = multiprocessing.Pipe()
            process = forked(_serve, rank, world, str(store), theirs)
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, f: Callable, *args, timeout: float = 600.0, **kwargs) -> list:
        for pipe in self._pipes:
            pipe.send((f, args, kwargs))
        answers: dict[int, object] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.world:
            ready = wait(
                [p for r, p in enumerate(self._pipes) if r not in answers], max(0, deadline - time.monotonic())
            )
            if not ready:
                self._fail(f"ranks {sorted(set(range(self.world)) - answers.keys())} gave no answer in {timeout:.0f} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    good, answers[rank] = pipe.recv()
                except EOFError:
                    self._fail(f"rank {rank} died")
                if not good:
                    self._fail(f"rank {rank}:\n{answers[rank]}")
        return [answers[rank] for rank in range(self.world)]

    @property
    def alive(self) -> bool:
        return all(p.is_alive() for p in self._processes)

    def stop(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(10)
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _fail(self, reason: str):
        self.kill()
        raise RankFailure(reason)


def _serve(rank: int, world: int, store: str, pipe) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    linear = torch.nn.functional.linear
    while (call := pipe.recv()) is not None:
        f, args, kwargs = call
        try:
            answer = True, f(*args, **kwargs)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
        torch.nn.functional.linear = linear  # DeepSpeed's stage 3 puts its own there, for as long as the process lives
        gc.collect()
    dist.destroy_process_group()
