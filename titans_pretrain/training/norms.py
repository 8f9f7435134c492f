"""Norms of gradients and weights by group of parameters: which part of a model a growing norm comes from."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from titans_pretrain.training.hooks import Hook

GROUPS = {
    "embeddings": ("embed_tokens.", "lm_head."),
    "memory": (".memory.", ".memory_queries", ".retrieve_proj."),
    "attention": (".attention.",),
    "feed_forward": (".mlp.",),
    "other": ("",),  # norms, gates between parts, persistent tokens
}
KINDS = ("grad_norm", "weight_norm")


class NormsHook(Hook):
    """Adds "grad_norm.GROUP", before clipping, and "weight_norm.GROUP", before the update, to the line of every `every`-th step. Over
    the whole model, whatever layout spreads it; their squares sum to those of the whole."""

    def __init__(self, every: int):
        self.every, self._found = every, {}

    @contextlib.contextmanager
    def around_step(self, trainer) -> Iterator[None]:
        def look() -> None:
            self._found = read_norms(trainer.engine.group_squares())

        self._found = {}
        if (trainer.step + 1) % self.every == 0:
            trainer.engine.before_step = look
        try:
            yield
        finally:
            trainer.engine.before_step = None

    def after_step(self, trainer, line: dict) -> None:
        line |= self._found


def group_of(name: str) -> str:
    """Of a parameter."""
    return next(group for group, marks in GROUPS.items() if any(mark in f".{name}" for mark in marks))


def sum_squares(tensors: Iterable[tuple[str, Tensor | None, Tensor]], device: torch.device) -> Tensor:
    """tensors: (name, gradient, weight). Sums over each group, float64 [GROUPS, KINDS]."""
    sums = torch.zeros(len(GROUPS), len(KINDS), dtype=torch.float64, device=device)
    for name, *both in tensors:
        row = sums[list(GROUPS).index(group_of(name))]
        for i, tensor in enumerate(both):
            if tensor is not None:
                row[i] += tensor.detach().square().sum(dtype=torch.float64)
    return sums


def read_norms(squares: Tensor) -> dict[str, float]:
    """squares [GROUPS, KINDS], of the whole model. Groups without a parameter are left out. Waits for the device."""
    norms = squares.sqrt().tolist()
    return {
        f"{kind}.{group}": value
        for i, kind in enumerate(KINDS)
        for group, row in zip(GROUPS, norms, strict=True)
        for value in [row[i]]
        if row[1] > 0
    }
