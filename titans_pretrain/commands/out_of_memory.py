"""What a run that ran out of memory should hear: what a process needs, by the numbers of `plan`, and which settings need less."""

import contextlib
import gc
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context

import torch
import torch.distributed as dist

from titans_pretrain.checkpoint.together import new_store
from titans_pretrain.commands.outlook import needed_memory
from titans_pretrain.commands.table import format_table
from titans_pretrain.config import Config
from titans_pretrain.parallel.layout import needs_segments

LEAST = 0.01  # of all memory, that a setting has to save to be named
_MARKS = ("DefaultCPUAllocator:", "std::bad_alloc")  # torch has no type for memory of the CPU
PATIENCE = timedelta(minutes=2)  # for the process that counts


class OutOfMemory(ValueError):
    """A run needed more than there is."""


@contextlib.contextmanager
def explained(config: Config, processes: int) -> Iterator[None]:
    """Around a training, on all its processes: raises OutOfMemory where it runs out of memory, once what would help is printed; with
    several processes one of those that ran out prints it."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    store = new_store("out of memory") if several else None
    try:
        yield
    except Exception as error:
        if (told := allocators_words(error)) is None:
            raise
        for each in _chain(error):
            traceback.clear_frames(each.__traceback__)  # the model and all else that they hold
        gc.collect()
        with _one_of_all(store) as first:
            if first:
                print(f"out of memory: {told}\n{_advice(config, processes)}", file=sys.stderr, flush=True)
        raise OutOfMemory(
            f"out of memory: {told}; with one of the settings above the same command goes on from the last checkpoint"
        ) from error


def allocators_words(error: BaseException) -> str | None:
    """What torch or Python said of memory that was not there, the first sentence; None for any other error."""
    for each in _chain(error):
        text = " ".join(str(each).split())
        if isinstance(each, (torch.OutOfMemoryError, MemoryError)) or any(mark in text for mark in _MARKS):
            return text[max(0, text.find("DefaultCPUAllocator:")) :].partition(". ")[0] or type(each).__name__
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _advice(config: Config, processes: int) -> str:
    try:
        return advice(config, processes)
    except Exception as e:  # counting takes memory too
        return (
            f"(what needs less was not counted: {' '.join(str(e).split()) or type(e).__name__}; `titans-pretrain plan` does it) try a lower "
            "train.micro_batch, train.recompute=block, or more processes with parallel.zero_stage=1"
        )


def advice(config: Config, processes: int) -> str:
    """Two tables: the memory of the process that needs most, and what single settings would make of it, the least first."""
    choices = dict(_choices(config, processes))
    found = _count([config, *choices.values()], processes)
    now = found.pop(0)
    assert now is not None, "the run had this layout"
    rows = {**now, "all": sum(now.values())}
    less = {name: parts for name, parts in zip(choices, found, strict=True) if parts is not None}
    less = {name: parts for name, parts in less.items() if rows["all"] - sum(parts.values()) > LEAST * rows["all"]}
    names = sorted(less, key=lambda name: sum(less[name].values()))
    tables = {
        "memory of a process, estimated": {name: _mib(size) for name, size in rows.items()},
        "what needs less": {
            name: f"{_mib(sum(less[name].values()))}: {_difference(now, less[name])}" for name in names
        },
    }
    if not names:
        tables["what needs less"] = {
            "no single setting": "a smaller model, shorter rows (data.seq_len), or more processes"
        }
    return "\n\n".join(f"{title}\n{format_table(rows)}" for title, rows in tables.items())


def _choices(config: Config, processes: int) -> Iterator[tuple[str, Config]]:
    """Settings that may need less, and the config with each. Not all are legal on so many processes."""
    train, p = config.train, config.parallel
    half = next((train.micro_batch // n for n in range(2, train.micro_batch + 1) if train.micro_batch % n == 0), 0)
    changes: list[dict[str, object]] = [{"train.micro_batch": half}] if half else []
    if train.recompute == "none":
        changes.append({"train.recompute": "block"})
    if needs_segments(config) and train.recompute != "segment":
        changes.append({"train.recompute": "segment"})
    changes.append({"parallel.segments_per_rank": 2 * p.segments_per_rank, "train.recompute": "segment"})
    if p.inflight > 1:
        changes.append({"parallel.inflight": 1})
    if processes > 1:
        changes += [{"parallel.zero_stage": stage} for stage in range(p.zero_stage + 1, 4)]
        changes += [{f"parallel.{name}": 2 * getattr(p, name)} for name in ("tp", "pp", "cp")]
    if p.zero_stage and not p.offload_optimizer and train.device != "cpu":
        changes.append({"parallel.offload_optimizer": True})
    if train.precision == "fp32":
        changes.append({"train.precision": "bf16"})
    for change in changes:
        with contextlib.suppress(ValueError):  # of the schema
            yield " ".join(f"{key}={str(value).lower()}" for key, value in change.items()), _changed(config, change)


def _changed(config: Config, change: dict[str, object]) -> Config:
    groups = {key.partition(".")[0] for key in change}
    own = {group: {k.partition(".")[2]: v for k, v in change.items() if k.startswith(group + ".")} for group in groups}
    return replace(config, **{group: replace(getattr(config, group), **values) for group, values in own.items()})


def _count(configs: list[Config], processes: int) -> list[dict[str, float] | None]:
    """Of each; None where its layout is refused. With tensor parallelism in another process: this one has process groups."""
    if all(config.parallel.tp == 1 for config in configs):
        return [_count_one(config, processes) for config in configs]
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        return list(other.map(_count_one, configs, [processes] * len(configs)))


def _count_one(config: Config, processes: int) -> dict[str, float] | None:
    try:
        return needed_memory(config, processes)
    except ValueError:
        return None


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _difference(now: dict[str, float], then: dict[str, float]) -> str:
    """ "gradients -12 MiB, activations +1 MiB": what changes by a MiB or more."""
    changed = {name: (then.get(name, 0) - now.get(name, 0)) / 2**20 for name in now | then}
    return ", ".join(f"{name} {by:+,.0f} MiB" for name, by in changed.items() if round(by)) or "less than a MiB"


@contextlib.contextmanager
def _one_of_all(store: dist.Store | None) -> Iterator[bool]:
    """Whether this process is the first that comes here. The others wait until it is through: when one ends, all do. None: there are
    no others."""
    if store is None:
        yield True
        return
    first = store.add("came", 1) == 1
    try:
        if not first:
            with contextlib.suppress(dist.DistError):
                store.wait(["told"], PATIENCE)
        yield first
    finally:
        if first:
            store.set("told", "1")
