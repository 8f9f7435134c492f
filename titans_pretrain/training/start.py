"""Where training starts: nowhere yet, the run's own newest checkpoint that is whole, or another run's."""

import sys
from pathlib import Path
from typing import NamedTuple

from titans_pretrain.checkpoint import check_checkpoint, checkpoints, find_checkpoint, latest_checkpoint
from titans_pretrain.checkpoint.together import DamagedCheckpoint, rank, world
from titans_pretrain.config import Config, changed_keys, load_config

# These change how the model computes, not what: they may differ from the checkpoint's.
_SPEED_ONLY = {"model.attention_backend", "model.memory.backend", "model.memory.checkpoint_every"}
# These too where only the weights are taken: no tensor depends on them, and a longer row may want others.
_REACH = {"model.window", "model.rope_theta"}
_NOT_TOLD = ("run.", "train.resume", "train.init_from")


class Start(NamedTuple):
    checkpoint: Path | None  # None: from the initial values
    weights_only: bool = False  # a fresh optimizer, step and data cursor
    data: bool = True  # goes on where the checkpoint stopped reading
    changes: tuple[str, ...] = ()  # settings that differ from the checkpoint's, "KEY: OLD -> NEW"


def find_start(config: Config) -> Start:
    """Where `config` starts, its files compared with their checksums. With several processes all call it.

    Raises ValueError where the run may not go on, or not with this model; DamagedCheckpoint where no checkpoint is whole."""
    train, run_dir = config.train, Path(config.run.dir)
    own = latest_checkpoint(run_dir)
    if own is not None:
        if train.resume == "never":
            raise ValueError(
                f"{run_dir} holds {own.name} and train.resume=never would train over it; choose another run.dir or "
                "train.resume=auto"
            )
        start = Start(_newest_whole(own))
    elif train.init_from is not None:
        start = Start(_initial_weights(Path(train.init_from), run_dir), weights_only=True, data=False)
    elif train.resume in ("auto", "never"):
        return Start(None)
    else:
        start = Start(find_checkpoint(train.resume), data=train.resume_data)
    if own is None:
        check_checkpoint(start.checkpoint)
    return start._replace(changes=_changes(start, config))


def _initial_weights(source: Path, run_dir: Path) -> Path:
    """The checkpoint that train.init_from means; of an export it is made, once, in RUN/init_from."""
    from titans_pretrain.hf.importing import is_export, write_checkpoint

    if not is_export(source):
        return find_checkpoint(source)
    if world() > 1:  # every process would hold the whole model
        raise ValueError(
            f"train.init_from={source} is an export, which one process reads; for several make a run of it first: "
            f"`titans-pretrain import {source} RUN`, then train.init_from=RUN"
        )
    return write_checkpoint(source, run_dir / "init_from")


def _newest_whole(newest: Path) -> Path:
    for checkpoint in reversed(checkpoints(newest.parent, newest)):
        try:
            check_checkpoint(checkpoint)
            return checkpoint
        except DamagedCheckpoint as e:
            if rank() == 0:
                print(f"WARNING: {e}; looks for the checkpoint before it", file=sys.stderr, flush=True)
    raise DamagedCheckpoint(
        f"no checkpoint up to {newest} is whole; write the name of a later one into {newest.parent / 'latest'}, or choose "
        "another run.dir"
    )


def _changes(start: Start, config: Config) -> tuple[str, ...]:
    """Settings that differ from the checkpoint's. Raises ValueError if the model is another one."""
    may_differ = _SPEED_ONLY | (_REACH if start.weights_only else set())
    changed = changed_keys(load_config(start.checkpoint / "config.yaml"), config)
    model = {k: v for k, v in changed.items() if k.startswith("model.") and k not in may_differ}
    if model:
        told = ", ".join(f"{key} is {old} there and {new} here" for key, (old, new) in model.items())
        advice = "a second stage trains the same model" if start.weights_only else "choose another run.dir"
        raise ValueError(f"{start.checkpoint} was written by another model: {told}; {advice}")
    if "train.optimizer" in changed and not start.weights_only:
        old, new = changed["train.optimizer"]
        raise ValueError(
            f"{start.checkpoint} has the moments of train.optimizer={old}, not of {new}: keep {old}, or give a new run.dir and "
            f"train.init_from={start.checkpoint} (the weights alone)"
        )
    return tuple(f"{k}: {old} -> {new}" for k, (old, new) in changed.items() if not k.startswith(_NOT_TOLD))
