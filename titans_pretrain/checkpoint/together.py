"""What all ranks do at once: where one of them fails, all do."""

import contextlib
import contextvars
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from titans_pretrain.data.background import Background

T = TypeVar("T")


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint does not hold what was written into it."""


# Over which processes agree: one group for each thread that does, None for the default one.
_group = contextvars.ContextVar("group", default=None)


@contextlib.contextmanager
def agreeing_over(group) -> Iterator[None]:
    """Inside, this thread agrees with the others' over `group`, of all processes."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def agreed_group():
    return _group.get()


_stores: Counter[str] = Counter()  # made in this process, by name


def new_store(name: str) -> dist.Store:
    """A part of the default group's store into which nobody has written, so that a run sees no sign of an earlier one in the same
    processes. All of them ask for one of this name equally often."""
    _stores[name] += 1
    return dist.PrefixStore(f"{name} {_stores[name]}", dist.distributed_c10d._get_default_store().clone())


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def from_all(mine) -> list:
    """What each rank says, in their order."""
    if world() == 1:
        return [mine]
    told = [None] * world()
    dist.all_gather_object(told, mine, group=_group.get())
    return told


def by_first(action: Callable[[], T]) -> T:
    """What `action` returns, or raises, on rank 0, on all ranks; the others wait, however long it takes."""
    future = Background().submit(action) if rank() == 0 else None
    wait_for_first(future)
    error = future and future.exception()
    error, result = from_all((error, None if future is None or error else future.result()))[0]
    if error is not None:
        raise error
    return result


def wait_for_first(future: Future | None, stopped: Callable[[], bool] = lambda: False, patience: int = 60) -> bool:
    """Whether rank 0's future (None elsewhere) has ended, on all ranks alike. They meet once a second, so that no timeout of a
    collective limits its time. Where one of them is stopped: not later than `patience` seconds after that."""
    rounds = 0
    while True:
        if future is not None:
            wait_for([future], timeout=1.0)
        told = from_all((future is None or future.done(), stopped()))
        if told[0][0]:
            return True
        rounds += any(asked for _, asked in told)
        if rounds > patience:
            return False


@contextlib.contextmanager
def together(what: str, advice: str, undo: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Around what all ranks do at once: where one of them fails, all undo it and raise: DamagedCheckpoint as it is, OSError
    with `what` and `advice` for what the system or torch refuses."""
    error = None
    try:
        yield
    except dist.DistError:
        raise  # a rank is lost: there is nobody to agree with
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError, CheckpointException) as e:
        error = _cause(e)  # torch has its own ways to say it
    told = [failed for failed in from_all(error and (isinstance(error, DamagedCheckpoint), _one_line(error))) if failed]
    if not told:
        return
    undo()
    for damaged, reason in told:
        if damaged:
            raise DamagedCheckpoint(reason) from error
    raise OSError(f"{what}: {told[0][1]}; {advice}") from error


def reading(checkpoint: Path):
    return together(
        f"cannot read {checkpoint}",
        f"if it is damaged, go on from an earlier one: write its name into {checkpoint.parent / 'latest'}",
    )


def _cause(error: BaseException) -> BaseException:
    """The content's or the system's own error where torch's came from one."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    return next((e for e in chain if isinstance(e, (OSError, DamagedCheckpoint))), error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
