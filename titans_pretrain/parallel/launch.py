"""The processes of a run: joining them, and seeing that they agree."""

import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist


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
