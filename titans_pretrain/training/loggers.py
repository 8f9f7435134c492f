"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases on request."""

import json
import logging
import os
import secrets
from pathlib import Path
from typing import Protocol

from titans_pretrain.config import Config
from titans_pretrain.data.background import Background

log = logging.getLogger(__name__)
PATIENCE = 10.0  # seconds for wandb to finish a run


class Logger(Protocol):
    def log(self, values: dict) -> None:
        """values: {"step": ..., name: number, ...}"""

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonlLogger:
    """RUN/metrics.jsonl, one JSON object per line. Opening it drops what came after `step` (of validations: after
    `validated`), so that what is done again after a resume stands there once."""

    def __init__(self, path: Path, step: int, validated: int):
        lines = read_metrics(path)
        kept = [line for line in lines if line["step"] <= (validated if "validation_loss" in line else step)]
        from titans_pretrain.checkpoint.store import write_text  # imports torch, which reading metrics does not need

        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 open as long as the run

    def log(self, values: dict) -> None:
        self._file.write(json.dumps(values) + "\n")

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut off by a crash is left out. Raises ValueError naming a line that is none."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if (
            not isinstance(values, dict)
            or not all(type(v) in (int, float) for v in values.values())
            or "step" not in values
        ):
            raise ValueError(f"{path}, line {number} is not a line of metrics: {line[:60]!r}; remove it")
        found.append(values)
    return found


class TensorBoardLogger:
    """RUN/tensorboard. What an earlier process logged after `step` is hidden."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, values: dict) -> None:
        for name, value in values.items():
            if name != "step":
                self._writer.add_scalar(name, value, values["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """One run of Weights & Biases over all resumes: its id stands in RUN/wandb-id. Offline unless WANDB_MODE says otherwise. Any
    failure switches it off with one line; it never ends a run."""

    def __init__(self, config: Config, run_dir: Path):
        self._run = None
        self._try(self._start, config, run_dir)

    def _start(self, config: Config, run_dir: Path) -> None:
        import dataclasses

        import wandb

        kept = run_dir / "wandb-id"
        if not kept.exists():
            kept.write_text(secrets.token_hex(8) + "\n")
        self._run = wandb.init(
            project=config.run.wandb,
            name=config.run.name,
            id=kept.read_text().strip(),
            resume="allow",
            dir=str(run_dir),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dataclasses.asdict(config),
        )

    def log(self, values: dict) -> None:
        if self._run is not None:
            self._try(self._run.log, {n: v for n, v in values.items() if n != "step"}, step=values["step"])

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self._run is not None:
            self._try(self._finish)

    def _finish(self) -> None:
        """In a thread that the process does not wait for: a run that is to be requeued has no time for a network."""
        try:
            Background().submit(self._run.finish).result(PATIENCE)
        except TimeoutError:
            raise TimeoutError(f"no answer within {PATIENCE:.0f} s; `wandb sync` sends what it keeps") from None

    def _try(self, call, *args, **kwargs) -> None:
        try:
            call(*args, **kwargs)
        except Exception as e:  # whatever wandb raises (no package, no key, no network) is not worth a run
            self._run = None
            log.warning("wandb is off: %s: %s", type(e).__name__, " ".join(str(e).split()))


def build_loggers(config: Config, run_dir: Path, step: int, validated: int) -> list[Logger]:
    """step, validated: the last step that was trained and the last that was validated, 0 at the start of a run."""
    loggers: list[Logger] = [JsonlLogger(run_dir / "metrics.jsonl", step, validated)]
    if config.run.tensorboard:
        loggers.append(TensorBoardLogger(run_dir / "tensorboard", step))
    if config.run.wandb:
        loggers.append(WandbLogger(config, run_dir))
    return loggers
