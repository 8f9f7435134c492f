"""What the memories of a model do, layer by layer: gates, how far the weights have moved, surprise, output."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from titans_pretrain.checkpoint.together import from_all
from titans_pretrain.models.memory import MemoryLayer, MemoryLayerState
from titans_pretrain.training.hooks import Hook

NAMES = {
    "forget": "alpha, mean over tokens and heads",
    "forget_std": "its spread",
    "momentum": "eta, mean",
    "momentum_std": "its spread",
    "lr": "theta, mean, before it is telescoped",
    "lr_std": "its spread",
    "drift": "|W - W_init| / |W_init| where the call ends",
    "surprise": "|S| / |W_init| there",
    "output_std": "standard deviation of the output",
}


class HealthHook(Hook):
    """Adds what Health tells to the line of every `every`-th step."""

    def __init__(self, model: nn.Module, every: int):
        self.health, self.every = Health(model), every

    def around_step(self, trainer) -> AbstractContextManager:
        return self.health.watching() if (trainer.step + 1) % self.every == 0 else contextlib.nullcontext()

    def after_step(self, trainer, line: dict) -> None:
        if trainer.step % self.every == 0:
            line |= self.health.of_all()


class Health:
    """Watches the memory layers of a model from outside, for as long as `watching` lasts.

    model: of this process; a layer that is not in it is another's to watch. What a tensor-parallel process sees is of its heads. Not for
    blocks that torch.compile has made one."""

    def __init__(self, model: nn.Module):
        found = {name: module for name, module in model.named_modules() if isinstance(module, MemoryLayer)}
        self.layers = {int(name.split(".")[1]): module for name, module in found.items()}
        self._sums: dict[int, Tensor] = {}
        self._calls: dict[int, int] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around forward passes."""
        self._sums, self._calls = {}, {}
        hooks = [layer.register_forward_hook(self._look(i), with_kwargs=True) for i, layer in self.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def read(self) -> dict[str, float]:
        """ "memory.LAYER.NAME" -> its mean over the calls that were watched, see NAMES. Waits for the device."""
        if not self._sums:
            return {}
        means = torch.stack([total / self._calls[i] for i, total in self._sums.items()]).tolist()
        return {
            f"memory.{i}.{name}": value
            for i, row in zip(self._sums, means, strict=True)
            for name, value in zip(NAMES, row, strict=True)
        }

    def of_all(self) -> dict[str, float]:
        """read() of all processes, which call it together; the mean where several have a layer."""
        told: dict[str, list[float]] = {}
        for values in from_all(self.read()):
            for name, value in values.items():
                told.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in sorted(told.items())}

    def _look(self, i: int):
        @torch.no_grad()
        def look(layer: MemoryLayer, args: tuple, kwargs: dict, result: tuple[Tensor, MemoryLayerState]) -> None:
            given = dict(zip(("x", "state", "positions", "persistent"), args, strict=False)) | kwargs
            x, positions = given["x"], given.get("positions")
            real = None if positions is None else positions >= 0
            numbers = []
            for gate in layer._gates(x, None):
                gate = gate.flatten(2).float()
                numbers += _mean_and_spread(gate if real is None else gate[:, : real.shape[1]], real)
            start = torch.cat([w.detach().float().flatten(1) for w in layer.weights], 1)  # [H, all]
            y, state = result
            now, surprise = (
                torch.cat([w.float().flatten(2) for w in tensors], 2)
                for tensors in (state.memory.weights, state.memory.surprise)
            )
            size = start.norm(dim=1)
            numbers += [
                ((now - start).norm(dim=2) / size).mean(),
                (surprise.norm(dim=2) / size).mean(),
                y.float().std(),
            ]
            self._sums[i] = self._sums.get(i, 0.0) + torch.stack(numbers)
            self._calls[i] = self._calls.get(i, 0) + 1

        return look


def _mean_and_spread(gate: Tensor, real: Tensor | None) -> list[Tensor]:
    """gate [B, T, n]; real [B, T]: those that count. No shape depends on what is real."""
    weight = torch.ones_like(gate) if real is None else real[..., None].expand_as(gate).float()
    count = weight.sum().clamp(min=1)
    mean = (gate * weight).sum() / count
    return [mean, ((gate - mean).square() * weight).sum().div(count).sqrt()]
