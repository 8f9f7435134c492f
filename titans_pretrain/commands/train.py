"""From a config to a trained run folder: builds the parts, resumes, trains, leaves the picture."""

import contextlib
import os
import random
import sys
from pathlib import Path

import numpy
import torch

from titans_pretrain.checkpoint import clear_leftovers, find_checkpoint, latest_checkpoint
from titans_pretrain.commands.outlook import memory_warning, run_warnings
from titans_pretrain.config import Config, changed_keys, flatten, load_config, save_config
from titans_pretrain.data import ShardError, build_reader, epoch_size
from titans_pretrain.data.storage import Folder
from titans_pretrain.data.tokenizer import ENTRY, read_tokenizer_entry
from titans_pretrain.models import build_model
from titans_pretrain.parallel.apply import build_engine
from titans_pretrain.parallel.launch import Watchdog, check_agreement, launched_world, leave_processes
from titans_pretrain.parallel.mesh import Mesh, build_mesh, describe
from titans_pretrain.parallel.zero_keys import check_block
from titans_pretrain.training.engine import pick_device
from titans_pretrain.training.gauge import Gauge
from titans_pretrain.training.loggers import build_loggers
from titans_pretrain.training.plot import plot_loss
from titans_pretrain.training.progress import Progress
from titans_pretrain.training.signals import INTERRUPTED_EXIT_CODE, StopRequest
from titans_pretrain.training.trainer import Trainer
from titans_pretrain.training.validation import Validator

# These change how the model computes, not what: they may differ from the checkpoint's.
_SPEED_ONLY = {"model.memory.backend", "model.memory.checkpoint_every"}


def train(config: Config) -> int:
    """Trains in `run.dir`, from its newest checkpoint if it has one. Returns the exit code: 0, or 85 when a signal
    stopped the run after a checkpoint (the same command goes on from it)."""
    try:
        with StopRequest() as stop:
            return _train(config, stop)
    finally:
        leave_processes()


def _train(config: Config, stop: StopRequest) -> int:
    check_data_is_set(config)
    check_block(config)
    run_dir = Path(config.run.dir)
    device = pick_device(config.train.device)
    if os.environ.get("RANK", "0") == "0" and (told := memory_warning(config, device, launched_world())):
        print(told, file=sys.stderr, flush=True)
    mesh = build_mesh(config, device)
    checkpoint = starting_checkpoint(config, run_dir)
    changed = _changes_since(checkpoint, config)
    check_agreement(flatten(config) | {"checkpoint": checkpoint and checkpoint.name, "torch": torch.__version__})
    with Watchdog():
        return _train_together(config, stop, mesh, checkpoint, changed)


def _train_together(config: Config, stop: StopRequest, mesh: Mesh, checkpoint: Path | None, changed: list[str]) -> int:
    run_dir = Path(config.run.dir)
    seed_everything(config.train.seed)
    place = {
        "rank": mesh.data.rank,
        "world": mesh.data.size,
        "context_rank": mesh.context.rank,
        "context_size": mesh.context.size,
        "segments_per_rank": config.parallel.segments_per_rank,
    }
    reader = build_reader(config, split="train", **place)
    validator = None
    if config.train.eval_every:
        validator = Validator(build_reader(config, split="validation", epochs=1, **place), config.train.eval_batches)
    with torch.device("meta"):
        model = build_model(config.model)
    parameters = sum(p.numel() for p in model.parameters())
    engine = build_engine(config, model, mesh, initialise=checkpoint is None)
    trainer = Trainer(config, engine, reader, validator, mesh.device)
    if checkpoint is not None:
        trainer.resume(checkpoint)

    loggers, progress = [], None
    if engine.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        clear_leftovers(run_dir)
        clear_leftovers(run_dir / "checkpoints")
        save_config(config, run_dir / "config.yaml")
        copy_tokenizer(config, run_dir)
        loggers = build_loggers(config, run_dir, trainer.step, trainer.validated)
        progress = Progress(config.train.steps, trainer.step, config.train.log_every)
        where = f"on {mesh.device}" if mesh.world == 1 else f"on {mesh.world} processes ({describe(mesh)})"
        progress.note(
            f"{'+'.join(config.model.variants)}, {parameters / 1e6:.2f}M parameters, {where}; run folder {run_dir}"
        )
        with contextlib.suppress(ShardError):  # the first shard's: what to do about it is the reader's to say
            epoch = epoch_size(config)
            trainer.gauge = Gauge(config, mesh.device, mesh.world, epoch[0])
            for line in run_warnings(config, trainer.gauge.peak, mesh.world, epoch):
                progress.note(line)
        if checkpoint is not None:
            progress.note(f"goes on from {checkpoint} (step {trainer.step})" + "".join(f"; {line}" for line in changed))
            if trainer.step >= config.train.steps:
                progress.note(f"nothing left to train: train.steps={config.train.steps}")
    try:
        done = trainer.run(run_dir, loggers, progress, stop)
    finally:
        if progress is not None:
            progress.close()
        for logger in loggers:
            logger.close()
    if engine.is_main:
        plot_loss(run_dir)
    if not done:
        if engine.is_main:
            where = f"saved {trainer.saved}" if trainer.saved else "nothing was trained yet"
            by = stop.received.name if stop.received else "a signal to another process"
            print(f"stopped by {by}: {where}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    return 0


def starting_checkpoint(config: Config, run_dir: Path) -> Path | None:
    """Where training starts: the run's own newest checkpoint, else the one that `train.resume` names, else nothing."""
    own, resume = latest_checkpoint(run_dir), config.train.resume
    if resume == "never" and own is not None:
        raise ValueError(
            f"{run_dir} holds {own.name} and train.resume=never would train over it; choose another run.dir or train.resume=auto"
        )
    if own is not None or resume in ("auto", "never"):
        return own
    return find_checkpoint(resume)


def _changes_since(checkpoint: Path | None, config: Config) -> list[str]:
    """Settings that differ from the checkpoint's, as text. Raises ValueError if the model is another one."""
    if checkpoint is None:
        return []
    changed = changed_keys(load_config(checkpoint / "config.yaml"), config)
    model = {k: v for k, v in changed.items() if k.startswith("model.") and k not in _SPEED_ONLY}
    if model:
        told = ", ".join(f"{key} is {old} there and {new} here" for key, (old, new) in model.items())
        raise ValueError(f"{checkpoint} was written by another model: {told}; choose another run.dir")
    return [f"{key}: {old} -> {new}" for key, (old, new) in changed.items() if not key.startswith("run.")]


def check_data_is_set(config: Config) -> None:
    if not (config.data.path or config.data.mixture):
        raise ValueError("data.path is not set; give the folder that titans-data wrote, e.g. data.path=DATA")


def copy_tokenizer(config: Config, run_dir: Path) -> None:
    """Puts the data's tokenizer into the run folder, so that the run can be used without its data."""
    source = Folder(config.data.path or next(iter(config.data.mixture)), config.data.cache_dir)
    target = run_dir / "tokenizer"
    target.mkdir(exist_ok=True)
    for name in (ENTRY, "tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        with contextlib.suppress(ShardError):  # not every kind of tokenizer has every file
            (target / name).write_bytes(source.read(f"tokenizer/{name}"))
    read_tokenizer_entry(target)  # what its kind needs has come


def seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
