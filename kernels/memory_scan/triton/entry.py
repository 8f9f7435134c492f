"""The backend `triton` as contract.py sees it. The kernels are imported at the first call: triton need not be installed."""

import os
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.hidden_split import HiddenSplit
from titans_pretrain.kernels.memory_scan.options import ScanOptions
from titans_pretrain.kernels.memory_scan.state import MemoryState
from titans_pretrain.kernels.memory_scan.triton.launch import row_of, shapes, tile_of


def scan(**arguments) -> tuple[Tensor, MemoryState]:
    """See memory_scan; arguments are validated there."""
    return _module("scan").scan(**arguments)


def step(**arguments) -> tuple[Tensor, MemoryState]:
    """See memory_step; arguments are validated there."""
    return _module("step").step(**arguments)


def read(**arguments) -> Tensor:
    """See memory_read; arguments are validated there."""
    return _module("step").read(**arguments)


def refuses_scan(*, q: Tensor, options: ScanOptions, **rest) -> str | None:
    """Which argument the kernels cannot serve, and why."""
    if tile_of(options.chunk_size) is None:
        return _refuses_device(q) or f"chunk_size={options.chunk_size}: it has {shapes()}"
    return refuses_read(q=q, **rest)


def refuses_step(*, q: Tensor, **rest) -> str | None:
    return refuses_read(q=q, **rest) or _refuses_gradient(q=q, **rest)


def refuses_read(*, q: Tensor, state: MemoryState, hidden_split: HiddenSplit, **_) -> str | None:
    if (reason := _refuses_device(q)) is not None:
        return reason
    if hidden_split.ranks > 1:
        return "hidden_split: it holds a whole memory on one rank"
    if state.weights[0].dtype != torch.float32:
        return f"state: it is {state.weights[0].dtype}, and the kernels have float32 states"
    hidden = state.weights[-1].shape[-2]
    if row_of(state.depth, q.shape[-1], hidden) is None:
        return f"state: depth {state.depth}, head size {q.shape[-1]}, hidden size {hidden}; it has {shapes()}"
    return None


def leaves(*, q: Tensor, **_) -> str | None:
    """Why "auto" goes on to the next backend although the kernels can serve."""
    return None if q.device.type == "cuda" else "q: Triton's interpreter is for tests"


def _refuses_gradient(**arguments) -> str | None:
    if not torch.is_grad_enabled():
        return None
    state, initial = arguments["state"], arguments.get("initial_state")
    states = [x for s in (state, initial) if s is not None for x in (*s.weights, *s.surprise, *(s.anchor or ()))]
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    if any(x.requires_grad for x in (*tensors, *states)):
        return "a gradient: it is for inference; use torch.no_grad()"
    return None


def _refuses_device(q: Tensor) -> str | None:
    if q.device.type != "cuda" and not (q.device.type == "cpu" and _interpreted()):
        return f"q: it is on {q.device.type}, and the kernels are for cuda"
    if not _installed():
        return "any call: the kernels need triton; pip install 'titans-pretrain[gpu]'"
    if q.device.type == "cuda" and not (8, 0) <= _capability(q.device) < (10, 0):
        return f"q: the kernels are proven on compute capability 8.0 to 9.0, and {q.device} has {_capability(q.device)}"
    return None


# To torch.compile these are constants of the machine.


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def _installed() -> bool:
    """Is triton there, and are the kernels? An exported model is without them."""
    return find_spec("triton") is not None and find_spec(f"{__package__}.scan") is not None


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _module(name: str):
    return import_module(f"{__package__}.{name}")
