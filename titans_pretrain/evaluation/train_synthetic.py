"""Trains a model on the sequences of the task `synthetic`, by the ordinary trainer on one process, for `eval --tasks synthetic`.

  python -m titans_pretrain.evaluation.train_synthetic synthetic/mqar model.variant=mag
  titans-pretrain eval runs/mqar --tasks synthetic synthetic.vocab=64 synthetic.pairs=8 synthetic.gap=512 'synthetic.lengths=[576]'
  python -m titans_pretrain.evaluation.train_synthetic tiny model.vocab_size=120 train.steps=2000 run.dir=runs/s5 synthetic.problem=s5

The config is one of `titans-pretrain train`, with a group `synthetic`; of its data.* nothing is used. The lengths of synthetic.lengths take turns, a micro-batch
each. The same command again goes on where it stopped.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from titans_pretrain.checkpoint import clear_leftovers
from titans_pretrain.config import Config, save_config
from titans_pretrain.config.load import load_as
from titans_pretrain.data import Batch
from titans_pretrain.evaluation.synthetic import Options, check_vocabulary, make_row
from titans_pretrain.evaluation.tasks import parse_lengths
from titans_pretrain.models import build_model
from titans_pretrain.parallel.launch import launched_world
from titans_pretrain.training.engine import SingleEngine, pick_device
from titans_pretrain.training.loggers import build_loggers
from titans_pretrain.training.progress import Progress
from titans_pretrain.training.run_lock import RunLock
from titans_pretrain.training.signals import INTERRUPTED_EXIT_CODE, StopRequest
from titans_pretrain.training.start import find_start
from titans_pretrain.training.trainer import Trainer


@dataclass
class SyntheticConfig(Config):
    synthetic: Options = field(default_factory=Options)


class SyntheticReader:
    """An endless iterator of Batch [rows, length], whose cursor is how many there have been."""

    def __init__(self, options: Options, rows: int):
        self._options, self._rows, self._drawn = options, rows, 0
        self._lengths = parse_lengths("synthetic.lengths", options.lengths)

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        length = self._lengths[self._drawn % len(self._lengths)]
        first = self._drawn * self._rows
        rows = [make_row(self._options, length, first + i, training=True) for i in range(self._rows)]
        tokens, labels = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        self._drawn += 1
        return Batch(tokens, labels, torch.arange(length).expand_as(tokens))

    def state_dict(self) -> dict:
        return {"drawn": self._drawn, "rows": self._rows}

    def load_state_dict(self, state: dict) -> None:
        self._drawn = state["drawn"] * state["rows"] // self._rows

    def close(self) -> None:
        pass


def train_synthetic(path: str, overrides: Sequence[str]) -> int:
    """path: a config of `titans-pretrain train` with a group `synthetic`; overrides: settings of both. Returns the exit code."""
    given = load_as(SyntheticConfig, path, overrides)
    options = given.synthetic
    config = Config(**{f.name: getattr(given, f.name) for f in fields(Config)})  # what everything else reads
    check_vocabulary(options, config.model.vocab_size)
    if config.data.seq_len_warmup:
        raise ValueError("data.seq_len_warmup cuts rows of a corpus; the lengths of these are synthetic.lengths")
    if launched_world() > 1:
        raise ValueError("this trains on one process; start it without torchrun")
    run_dir, device = Path(config.run.dir), pick_device(config.train.device)
    torch.manual_seed(config.train.seed)
    with StopRequest() as stop, RunLock(run_dir):
        for folder in (run_dir, run_dir / "checkpoints"):
            clear_leftovers(folder)
        start = find_start(config)
        with torch.device(device):
            model = build_model(config.model)
        model.set_recompute("block" if config.train.recompute == "block" else "none")
        trainer = Trainer(
            config,
            SingleEngine(config, model, device),
            SyntheticReader(options, config.train.micro_batch),
            None,
            device,
        )
        if start.weights_only:
            trainer.start_from(start.checkpoint)
        elif start.checkpoint is not None:
            trainer.resume(start.checkpoint, start.data)
        save_config(config, run_dir / "config.yaml")
        loggers = build_loggers(config, run_dir, trainer.step, trainer.validated)
        progress = Progress(config.train.steps, trainer.step, config.train.log_every, config.train.rows_until)
        try:
            done = trainer.run(run_dir, loggers, progress, stop)
        finally:
            for part in (progress, *loggers):
                part.close()
    return 0 if done else INTERRUPTED_EXIT_CODE


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        return train_synthetic(sys.argv[1], sys.argv[2:])
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
