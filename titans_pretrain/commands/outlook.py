"""What a person should hear before a run begins: memory that is not there, steps of minutes, padding, epochs without end."""

import contextlib
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from titans_pretrain.commands.layout import needed_memory
from titans_pretrain.commands.plan import flops_per_token
from titans_pretrain.config import Config
from titans_pretrain.models import build_model
from titans_pretrain.training.progress import format_seconds

SLOW_STEP = 60.0  # seconds
MUCH_PADDING = 0.5  # of all columns
MANY_EPOCHS = 100
_PER_COLUMN = 2000 * 4  # bytes of activations for each column, layer and channel, many times what any layout needs


def memory_warning(config: Config, device: torch.device, processes: int) -> str | None:
    """If the processes of this machine need more than is free on it, or on their GPU."""
    free = free_memory(device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    model = config.model
    columns = config.train.micro_batch * config.data.seq_len
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(model).parameters())
    most = 20 * parameters + _PER_COLUMN * columns * model.dim * model.layers
    if free is None or most * here <= free:  # counting takes seconds
        return None
    if config.parallel.tp > 1:  # counted with process groups, which this process must not have had
        with ProcessPoolExecutor(1, get_context("spawn")) as other:
            parts = other.submit(needed_memory, config, processes).result()
    else:
        parts = needed_memory(config, processes)
    if sum(parts.values()) * here <= free:
        return None
    told = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
    return (
        f"warning: {f'each of {here} processes' if here > 1 else 'this run'} needs about {sum(parts.values()) / 2**30:.1f} GiB "
        f"({told}) and {free / 2**30:.1f} GiB are free; lower train.micro_batch or data.seq_len, or set train.recompute=block"
    )


def run_warnings(config: Config, peak: float | None, processes: int, epoch: tuple[int, int]) -> list[str]:
    """peak: FLOP/s of a process's device; epoch: its tokens and columns, see epoch_size."""
    told, train, padding = [], config.train, 1 - epoch[0] / max(1, epoch[1])
    columns = train.global_batch * config.data.seq_len
    flops = flops_per_token(config)[1] * columns
    if peak and flops / (peak * processes) > SLOW_STEP:
        told.append(
            f"a step takes {format_seconds(flops / (peak * processes))} or more: {flops / 1e12:,.1f} TFLOPs, and "
            f"{f'{processes} processes do' if processes > 1 else 'this machine does'} at most {peak * processes / 1e9:,.0f} GFLOP/s"
        )
    if padding > MUCH_PADDING:
        told.append(
            f"warning: {padding:.0%} of what is read is padding, because a document starts at a multiple of "
            f"{config.model.document_multiple} tokens only; lower model.memory.chunk_size (mac: model.mac.segment), or set "
            "data.reset_documents=false"
        )
    epochs = train.rows_until(train.steps) * config.data.seq_len / max(1, epoch[1])
    if epochs > MANY_EPOCHS:
        told.append(
            f"warning: {train.steps:,} steps read the {epoch[0]:,} training tokens {epochs:,.0f} times; lower train.steps"
        )
    return told


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, or on this machine within the limit that its container sets; None if nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):  # not on every system
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")))
    for limit in ("memory.max", "memory.limit_in_bytes", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" where there is none
            found.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return min(found, default=None)
