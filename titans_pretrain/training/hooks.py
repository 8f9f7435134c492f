"""What hangs on the training loop. The loop itself knows steps, validation and checkpoints; all else is a hook."""

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titans_pretrain.training.trainer import Trainer


class Hook:
    """Override what is needed. `Trainer.hooks` are called in their order, on every process, which must do alike what it does together.

    name: of its state in a checkpoint's trainer.json; None: it has none."""

    name: str | None = None

    def around_step(self, trainer: "Trainer") -> AbstractContextManager:
        """Entered before a step's rows are read, left after its update. trainer.step: finished steps, so far."""
        return contextlib.nullcontext()

    def after_step(self, trainer: "Trainer", line: dict) -> None:
        """line: of the metrics; numbers may be added. Its loss and gradient norm are tensors of the device: a look at them waits."""

    def after_validation(self, trainer: "Trainer", line: dict) -> None:
        """line: what was found."""

    def after_save(self, trainer: "Trainer", checkpoint: Path) -> None:
        """The checkpoint is on disk; with train.checkpoint_async some steps later."""

    def after_run(self, trainer: "Trainer") -> None:
        """All steps are done, or a signal stopped the run; its last checkpoint is on disk."""

    def on_error(self, trainer: "Trainer", error: Exception) -> None:
        """Before the error that ends the run is raised."""

    def state_dict(self) -> dict:
        """JSON-able: what its future steps depend on, alike on every process."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Of the checkpoint that the run goes on from, if it has any of this hook."""
