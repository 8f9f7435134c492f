"""From a config to a trained run folder: builds the parts, resumes, trains, leaves the picture."""

import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy
import torch

from titans_pretrain.checkpoint import clear_leftovers, latest_checkpoint
from titans_pretrain.checkpoint.store import atomic_folder
from titans_pretrain.checkpoint.together import from_all, rank
from titans_pretrain.commands.out_of_memory import explained
from titans_pretrain.commands.outlook import memory_warning, run_warnings
from titans_pretrain.commands.report import held_out_entropy
from titans_pretrain.config import Config, flatten, save_config
from titans_pretrain.data import NoDocuments, ShardError, build_reader, epoch_size, open_manifest
from titans_pretrain.data.storage import Folder
from titans_pretrain.data.tokenizer import DEFINITION, ENTRY, read_tokenizer_entry
from titans_pretrain.models import build_model
from titans_pretrain.parallel.apply import build_engine
from titans_pretrain.parallel.launch import check_agreement, launched_world, leave_processes
from titans_pretrain.parallel.mesh import Mesh, build_mesh, describe
from titans_pretrain.parallel.watchdog import Watchdog
from titans_pretrain.parallel.zero_keys import check_block
from titans_pretrain.training.engine import pick_device
from titans_pretrain.training.events import log_event
from titans_pretrain.training.gauge import Gauge
from titans_pretrain.training.health import HealthHook
from titans_pretrain.training.hooks import Hook
from titans_pretrain.training.loggers import build_loggers
from titans_pretrain.training.mirror import NOT_COPIED_EXIT_CODE, Mirror
from titans_pretrain.training.norms import NormsHook
from titans_pretrain.training.optimizer import learning_rate
from titans_pretrain.training.plot import plot_loss
from titans_pretrain.training.profiler import Profiler
from titans_pretrain.training.progress import Progress
from titans_pretrain.training.run_lock import RunLock
from titans_pretrain.training.signals import INTERRUPTED_EXIT_CODE, StopRequest
from titans_pretrain.training.start import Start, find_start
from titans_pretrain.training.stragglers import StragglersHook
from titans_pretrain.training.trainer import Trainer
from titans_pretrain.training.validation import Validator


def train(config: Config, hooks: Sequence[Hook] = ()) -> int:
    """Trains in `run.dir`, from its newest checkpoint if it has one. Returns the exit code: 0, 85 when a signal stopped the run
    after a checkpoint (the same command goes on from it), or 87 when all is done and train.checkpoint_store lacks the last one.

    hooks: of one's own on the training loop, see training/hooks.py."""
    try:
        with StopRequest() as stop:
            return _train(config, stop, hooks)
    finally:
        leave_processes()


def _train(config: Config, stop: StopRequest, hooks: Sequence[Hook]) -> int:
    check_data_is_set(config)
    check_block(config)
    run_dir, device = Path(config.run.dir), pick_device(config.train.device)
    if os.environ.get("RANK", "0") == "0" and (told := memory_warning(config, device, launched_world())):
        print(told, file=sys.stderr, flush=True)
    mesh = build_mesh(config, device)
    hang_after = config.parallel.hang_minutes * 60 or None
    with Watchdog(config.parallel.lost_after_seconds, hang_after) as watchdog, _owning(run_dir):
        newest = latest_checkpoint(run_dir)
        check_agreement(flatten(config) | {"checkpoint": newest and newest.name, "torch": torch.__version__})
        start = find_start(config)
        with explained(config, launched_world()):
            return _train_together(config, stop, mesh, start, [watchdog, *hooks])


@contextlib.contextmanager
def _owning(run_dir: Path) -> Iterator[None]:
    """Around what one run may do in its folder: the first process takes the lock. Where it is refused, all raise."""
    with contextlib.ExitStack() as held:
        refused = None
        if rank() == 0:
            try:
                held.enter_context(RunLock(run_dir))
                clear_leftovers(run_dir)
                clear_leftovers(run_dir / "checkpoints")
            except (ValueError, OSError) as e:
                refused = e
        if (error := from_all(refused)[0]) is not None:
            raise error
        yield


def _train_together(config: Config, stop: StopRequest, mesh: Mesh, start: Start, hooks: Sequence[Hook]) -> int:
    run_dir = Path(config.run.dir)
    seed_everything(config.train.seed)
    place = {
        "rank": mesh.data.rank,
        "world": mesh.data.size,
        "context_rank": mesh.context.rank,
        "context_size": mesh.context.size,
        "segments_per_rank": config.parallel.segments_per_rank,
        "gather": from_all if mesh.world > 1 else None,
        "pinned": mesh.device.type == "cuda",
        "stopped": lambda: stop.received is not None,
    }
    reader = build_reader(config, split="train", **place)
    validator, without_validation = None, None
    if config.train.eval_every:
        rows = config.train.eval_batches * config.train.micro_batch  # of all processes: the loss is that of one process
        try:
            validation = build_reader(config, split="validation", epochs=1, rows=rows, **place)
            validator = Validator(validation, config.train.eval_batches, average=config.train.ema > 0)
        except NoDocuments as error:
            without_validation = f"warning: trains without validation: {error}"
    with torch.device("meta"):
        model = build_model(config.model)
    parameters = sum(p.numel() for p in model.parameters())
    engine = build_engine(config, model, mesh, initialise=start.checkpoint is None)
    trainer = Trainer(config, engine, reader, validator, mesh.device)
    profiler = Profiler(run_dir, config.run.profile_steps, mesh.rank)
    trainer.hooks = [*hooks, profiler]
    mirror = None
    if config.train.checkpoint_store is not None:
        mirror = Mirror(config.train, run_dir, lambda: stop.received is not None)
        trainer.hooks.append(mirror)
    if every := config.train.health_every:
        trainer.hooks.append(NormsHook(every))
        if not config.train.compile:
            trainer.hooks.append(HealthHook(engine.model, every))
    if mesh.world > 1 and config.parallel.zero_stage < 2:
        trainer.hooks.append(StragglersHook(engine.stopwatch, config.train.log_every, mesh.hosts))
    if start.weights_only:
        trainer.start_from(start.checkpoint)
    elif start.checkpoint is not None:
        trainer.resume(start.checkpoint, start.data)

    loggers, progress = [], None
    if engine.is_main:
        save_config(config, run_dir / "config.yaml")
        copy_tokenizer(config, run_dir)
        loggers = build_loggers(config, run_dir, trainer.step, trainer.validated)
        progress = Progress(config.train.steps, trainer.step, config.train.log_every, config.train.rows_until)
        where = f"on {mesh.device}" if mesh.world == 1 else f"on {mesh.world} processes ({describe(mesh)})"
        progress.note(
            f"{'+'.join(config.model.variants)}, {parameters / 1e6:.2f}M parameters, {where}; run folder {run_dir}"
        )
        with contextlib.suppress(ShardError):  # the first shard's: what to do about it is the reader's to say
            epoch = epoch_size(config)
            trainer.gauge = Gauge(config, mesh.device, mesh.world, epoch[0])
            for line in run_warnings(config, trainer.gauge.peak, mesh.world, epoch):
                progress.note(line)
        if without_validation:
            progress.note(without_validation)
        for line in _told(start, trainer):
            progress.note(line)
        begun = "started" if start.checkpoint is None or start.weights_only else "resumed"
        log_event(run_dir, begun, trainer.step, processes=mesh.world)
    if mirror is not None:
        mirror.start()
    try:
        with profiler:
            done = trainer.run(run_dir, loggers, progress, stop)
    finally:
        for part in [reader, *([validator.reader] if validator else []), *([progress] if progress else []), *loggers]:
            _despite_failures(part.close)
    if done and engine.is_main:
        log_event(run_dir, "finished", trainer.step)
        _despite_failures(lambda: _draw(config, run_dir))
    if not done and engine.is_main:
        log_event(run_dir, "stopped", trainer.step, by=stop.received.name if stop.received else "another process")
        where = f"saved {trainer.saved}" if trainer.saved else "nothing was trained yet"
        by = stop.received.name if stop.received else "a signal to another process"
        told = f"stopped by {by}: {where}; the same command goes on from there"
        _despite_failures(partial(print, told, file=sys.stderr))
    if mirror is not None and mirror.missing is not None and engine.is_main:
        told = f"{'error' if done else 'warning'}: {mirror.missing}; the same command tries again"
        _despite_failures(partial(print, told, file=sys.stderr))
    if not done:
        return INTERRUPTED_EXIT_CODE
    return NOT_COPIED_EXIT_CODE if mirror is not None and mirror.missing is not None else 0


def _draw(config: Config, run_dir: Path) -> None:
    entropy = held_out_entropy(config)
    plot_loss(run_dir, None if isinstance(entropy, str) else entropy)


def _told(start: Start, trainer: Trainer) -> list[str]:
    """What a person is told of where the run starts, a line each."""
    if start.checkpoint is None:
        return []
    if start.weights_only:
        lines = [f"starts with the weights of {start.checkpoint}; optimizer, step and data from the beginning"]
    else:
        lines = [
            f"goes on from {start.checkpoint} (step {trainer.step})"
            + ("" if start.data else "; data from the beginning")
        ]
    lines += [f"  {change}" for change in start.changes]
    train = trainer.config.train
    falls = train.steps - train.decay_steps
    if train.schedule == "wsd" and start.branches and falls < trainer.step < train.steps:
        lines.append(
            f"warning: the learning rate falls from step {falls} on, which is before this checkpoint, and begins at "
            f"{learning_rate(trainer.step + 1, train):.2e}; for all of the decay set train.steps={trainer.step + train.decay_steps}"
        )
    if trainer.step >= trainer.config.train.steps:
        lines.append(f"nothing left to train: train.steps={trainer.config.train.steps}")
    return lines


def _despite_failures(call: Callable[[], object]) -> None:
    """Calls what is of no consequence to the checkpoint, and so to how the run ends: a failure is told."""
    try:
        call()
    except Exception as e:  # whatever matplotlib, TensorBoard or a full disk say
        with contextlib.suppress(OSError):  # nobody listens any more
            print(
                f"warning: {type(e).__name__}: {' '.join(str(e).split())}; the training is not affected",
                file=sys.stderr,
            )


def check_data_is_set(config: Config) -> None:
    if not (config.data.path or config.data.mixture):
        raise ValueError("data.path is not set; give the folder that titans-data wrote, e.g. data.path=DATA")


def copy_tokenizer(config: Config, run_dir: Path) -> None:
    """Puts the tokenizer of the data that was opened into the run folder, so that the run can be used without its data."""
    source = Folder(config.data.path or next(iter(config.data.mixture)), config.data.cache_dir)
    expected = open_manifest(source, fresh=False).tokenizer
    with atomic_folder(run_dir / "tokenizer") as target:
        names = (ENTRY, DEFINITION[expected.kind], "tokenizer.json", "tokenizer_config.json")
        for name in dict.fromkeys(filter(None, names)):
            with contextlib.suppress(ShardError):  # not every tokenizer has a Hugging Face form
                # not from the cache: the data may have been made anew, with another tokenizer
                (target / name).write_bytes(source.read(f"tokenizer/{name}", fresh=True))
        found = read_tokenizer_entry(target)
        if found != expected:
            raise ValueError(f"{source.path}/tokenizer is {found}, the manifest says {expected}; make the data anew")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
