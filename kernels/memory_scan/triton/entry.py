"""The backend `triton` as contract.py sees it. The kernels are imported at the first call that they may serve:
triton need not be installed."""

import os
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan.hidden_split import HiddenSplit
from titans_pretrain.kernels.memory_scan.options import ScanOptions
from titans_pretrain.kernels.memory_scan.state import MemoryState
from titans_pretrain.kernels.memory_scan.triton.launch import row_of, shapes, tile_of

# Registered with torch by operators.py and step.py.
OPERATORS = torch.ops.titans_pretrain


def scan(
    q: Tensor, k: Tensor, v: Tensor, forget: Tensor, momentum: Tensor, lr: Tensor, state: MemoryState, *, options: ScanOptions,
    reset: Tensor | None, initial_state: MemoryState | None, checkpoint_every: int | None, hidden_split: HiddenSplit,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """See memory_scan; arguments are validated there."""
    depth = state.depth
    states = [*state.weights, *state.surprise, *(state.anchor or ())]
    if initial_state is not None:
        states += [*initial_state.weights, *initial_state.surprise]
    tokens = [x.contiguous() for x in (q, k, v, forget, momentum, lr)]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (*tokens, *states))
    y, *out = OPERATORS.memory_scan(
        tokens, states, reset, depth, state.offset, options.chunk_size, options.residual_norm, options.damping,
        options.forget_to == "initial", checkpoint_every, differentiable,
    )  # fmt: skip
    offset = (state.offset + q.shape[1]) % options.chunk_size
    weights, surprise, anchor = (tuple(out[i * depth : (i + 1) * depth]) for i in range(3))
    return y, MemoryState(weights, surprise, anchor if offset else None, offset)


def step(
    q: Tensor, k: Tensor, v: Tensor, forget: Tensor, momentum: Tensor, lr: Tensor, state: MemoryState, *, options: ScanOptions,
    initial_state: MemoryState | None, hidden_split: HiddenSplit,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """See memory_step; arguments are validated there."""
    anchor = state.anchor or state.weights
    towards = initial_state.weights if options.forget_to == "initial" else ()
    damping = options.damping if options.residual_norm else 0.0
    y, *new = OPERATORS.memory_step(
        [q, k, v, forget, momentum, lr], state.weights, state.surprise, anchor, towards, options.residual_norm, damping
    )
    offset = (state.offset + 1) % options.chunk_size
    return y, MemoryState(tuple(new[::2]), tuple(new[1::2]), tuple(anchor) if offset else None, offset)


def read(q: Tensor, state: MemoryState, *, residual_norm: bool, hidden_split: HiddenSplit) -> Tensor:
    """See memory_read; arguments are validated there."""
    return OPERATORS.memory_read(q, state.weights, residual_norm)


def refuses_scan(*, q: Tensor, options: ScanOptions, **rest) -> str | None:
    """Which argument the kernels cannot serve, and why."""
    if tile_of(options.chunk_size) is None:
        return _refuses_device(q) or f"chunk_size={options.chunk_size}: it has {shapes()}"
    return refuses_read(q=q, **rest)


def refuses_step(*, q: Tensor, state: MemoryState, **rest) -> str | None:
    if state.ragged:
        return "state: its rows stand at offsets of their own, and the kernel has one for all"
    return refuses_read(q=q, state=state, **rest) or _refuses_gradient(q=q, state=state, **rest)


def refuses_read(*, q: Tensor, state: MemoryState, hidden_split: HiddenSplit, **_) -> str | None:
    if (reason := _refuses_device(q)) is not None:
        return reason
    if hidden_split.ranks > 1:
        return "hidden_split: it holds a whole memory on one rank"
    if state.weights[0].dtype != torch.float32:
        return f"state: it is {state.weights[0].dtype}, and the kernels have float32 states"
    hidden = state.weights[-1].shape[-2]
    row = row_of(state.depth, q.shape[-1], hidden)
    if row is None:
        return f"state: depth {state.depth}, head size {q.shape[-1]}, hidden size {hidden}; it has {shapes()}"
    if q.device.type == "cuda" and row.shared > (most := _shared_memory(q.device)):
        return f"state: depth {state.depth}, head size {q.shape[-1]} takes {row.shared} KiB of shared memory, and {q.device} has {most}"
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
        return "a gradient: one token and reading alone are for inference; use torch.no_grad(), or backend=auto in training"
    return None


def _refuses_device(q: Tensor) -> str | None:
    if q.device.type != "cuda" and not (q.device.type == "cpu" and _interpreted()):
        return f"q: it is on {q.device.type}, and the kernels are for cuda"
    if not _loaded():
        return "any call: its kernels need triton; pip install 'titans-pretrain[gpu]'"
    if q.device.type == "cuda" and not (8, 0) <= _capability(q.device) < (10, 0):
        return f"q: the kernels are proven on compute capability 8.0 to 9.0, and {q.device} has {_capability(q.device)}"
    return None


# To torch.compile these are constants of the machine.


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def _loaded() -> bool:
    """Registers the operators, where triton is there, and so are the kernels: an exported model is without them."""
    if find_spec("triton") is None or find_spec(f"{__package__}.operators") is None:
        return False
    for module in ("operators", "step"):
        import_module(f"{__package__}.{module}")
    return True


@torch.compiler.assume_constant_result
def _shared_memory(device: torch.device) -> int:
    """KiB that a block can have: 227 of a Hopper GPU, 99 of compute capability 8.6 and 8.9."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
