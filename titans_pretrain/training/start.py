"""Where training starts: nowhere yet, the run's own newest checkpoint that is whole, or another run's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from titans_pretrain.checkpoint import check_checkpoint, checkpoints, find_checkpoint, latest_checkpoint
from titans_pretrain.checkpoint.together import DamagedCheckpoint, from_all, rank
from titans_pretrain.config import Config, changed_keys, load_run_config

# These change how the model computes, not what: they may differ from the checkpoint's.
_SPEED_ONLY = {"model.attention_backend", "model.memory.backend", "model.memory.checkpoint_every"}
# These too where only the weights are taken: no tensor depends on them, and a longer row may want others.
_REACH = {"model.window", "model.rope_theta"}
_NOT_TOLD = ("run.", "train.resume", "train.init_from")


class Start(NamedTuple):
    checkpoint: Path | None  # None: from the initial values
    weights_only: bool = False  # a fresh optimizer, step and data cursor
    data: bool = True  # goes on where the checkpoint stopped reading
    branches: bool = False  # off another run
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
        start = Start(find_checkpoint(train.resume), data=train.resume_data, branches=True)
    if own is None:
        check_checkpoint(start.checkpoint)
    return start._replace(changes=_changes(start, config))


def _initial_weights(source: Path, run_dir: Path) -> Path:
    """The checkpoint that train.init_from means; of an export it is made, once, in RUN/init_from."""
    from titans_pretrain.hf.importing import is_export

    if not is_export(source):
        return find_checkpoint(source)
    refused = _import_alone(source, run_dir / "init_from") if rank() == 0 else None
    for told in from_all(refused):
        if told is not None:
            raise ValueError(f"train.init_from={source}: {told}")
    return find_checkpoint(run_dir / "init_from")


def _import_alone(source: Path, folder: Path) -> str | None:
    """`titans-pretrain import` in a process of its own, whose memory holds the whole model while no other does. Its error."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "titans_pretrain", "import", str(source), str(folder)]
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    ended = subprocess.run(command, env=alone, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    last = ended.stderr.strip().splitlines()[-1:] or [f"the import ended with {ended.returncode}"]
    return last[0].removeprefix("error: ") if ended.returncode else None


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
    changed = changed_keys(load_run_config(start.checkpoint), config)
    model = {k: v for k, v in changed.items() if k.startswith("model.") and k not in may_differ}
    if model:
        told = ", ".join(f"{key} is {old} there and {new} here" for key, (old, new) in model.items())
        advice = "a second stage trains the same model" if start.weights_only else "choose another run.dir"
        raise ValueError(f"{start.checkpoint} was written by another model: {told}; {advice}")
    return tuple(f"{k}: {old} -> {new}" for k, (old, new) in changed.items() if not k.startswith(_NOT_TOLD))
