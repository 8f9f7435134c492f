"""Saving while training goes on: the state is copied, and a thread writes the copy."""

import contextlib
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titans_pretrain.checkpoint.state import prepare, take_snapshot, write_snapshot
from titans_pretrain.checkpoint.together import agreeing_over, world
from titans_pretrain.config import Config
from titans_pretrain.data.background import Background, at_once


class Saver:
    """Writes one checkpoint at a time. With several processes each has one, and all make their calls in step.

    background: save() returns when the state is copied, which doubles its CPU memory; else when it is on disk."""

    def __init__(self, background: bool):
        self.staging = Staging() if background else None
        self._submit = Background().submit if background else at_once
        # The thread agrees with those of the other processes while the main threads agree on other things.
        self._group = dist.new_group(backend="gloo") if background and world() > 1 else None
        self._pending: Future[Path] | None = None
        self._run_dir: Path | None = None

    def start(self, run_dir: Path) -> None:
        """Makes what has to be there from now on."""
        prepare(run_dir)
        self._run_dir = run_dir

    def save(
        self, run_dir: Path, config: Config, model: nn.Module, optimizer, trainer: dict, tensor_group=None
    ) -> None:
        """See state.take_snapshot and write_snapshot. The one before must have been waited for."""
        assert self._pending is None, "one checkpoint at a time"
        if run_dir != self._run_dir:
            self.start(run_dir)
        snapshot = take_snapshot(config, model, optimizer, trainer, tensor_group, self.staging)
        self._pending = self._submit(self._write, run_dir, snapshot)

    def wait(self) -> Path | None:
        """The checkpoint that was being written, None if none was. Raises, on all processes, what write_snapshot does."""
        pending, self._pending = self._pending, None
        return pending and pending.result()

    @property
    def failed(self) -> bool:
        """Whether wait() would raise, as far as this process knows by now."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def _write(self, run_dir: Path, snapshot) -> Path:
        with agreeing_over(self._group) if self._group else contextlib.nullcontext():
            return write_snapshot(run_dir, snapshot)


class Staging:
    """Copies of tensors in CPU memory, pinned beside a GPU; the same memory every time."""

    def __init__(self):
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(tensor, non_blocking=True)

    def finish(self) -> None:
        """Waits until all copies are made."""
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
