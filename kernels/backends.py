"""What all kernels share: which backend serves a call, and how they stand to autocast and to a device's values."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def serves_all(**arguments) -> None:
    """`refuses` of a backend that serves every call that the contract allows, `leaves` of one that "auto" may always take."""


@dataclass(frozen=True)
class Backend:
    """One way to compute a kernel.

    run: called with the arguments of the contract, checked, by keyword.
    refuses: called with the same; from devices, dtypes and shapes alone, which argument it cannot serve and why
    ("q: float64, and it has float32 and bfloat16 only"), or None. It must not read a tensor's values.
    leaves: likewise, what of a call that it can serve "auto" should leave to the next.
    """

    name: str
    run: Callable
    refuses: Callable[..., str | None] = serves_all
    leaves: Callable[..., str | None] = serves_all


def choose(kernel: str, backends: Sequence[Backend], wanted: str, arguments: dict) -> Backend:
    """The backend named `wanted`, or for "auto" the first of `backends` that can serve these arguments, logged once.

    Raises ValueError for a name that is not known, and for a backend that cannot serve: it says which argument and why.
    """
    if wanted not in ("auto", *(b.name for b in backends)):
        raise ValueError(f"{kernel}: backend={wanted!r} is not one of auto, {', '.join(b.name for b in backends)}")
    refused = []
    for backend in backends:
        if wanted not in ("auto", backend.name):
            continue
        if (reason := backend.refuses(**arguments)) is not None:
            refused.append(f"backend={backend.name} cannot serve {reason}")
        elif wanted == "auto" and (reason := backend.leaves(**arguments)) is not None:
            refused.append(f"backend={backend.name} leaves {reason}")
        else:
            if wanted == "auto":
                _log_choice(kernel, backend.name, "; ".join(refused))
            return backend
    raise ValueError(f"{kernel}: {'; '.join(refused)}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast where x is, or None while it is off."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Operations as they are written, where x is."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def values_at_hand(x: Tensor) -> bool:
    """May a check read x's values? On a CPU that costs next to nothing; another device would have to finish its work first, and
    torch's FakeTensor says that it is on a CPU and has none."""
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


@cache
def _log_choice(kernel: str, name: str, refused: str) -> None:
    logger.info("%s: backend %s%s", kernel, name, f" ({refused})" if refused else "")
