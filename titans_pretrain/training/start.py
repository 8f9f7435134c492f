"""Where training starts: nowhere yet, the run's own newest checkpoint that is whole, or another run's."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

from titans_pretrain.checkpoint import check_checkpoint, checkpoints, find_checkpoint, latest_checkpoint
from titans_pretrain.checkpoint.remote import RemoteStore, fetch_checkpoint
from titans_pretrain.checkpoint.together import DamagedCheckpoint, by_first, rank
from titans_pretrain.config import Config, changed_keys, load_run_config
from titans_pretrain.training.mirror import RUN_FILES

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
    if train.checkpoint_store is not None and _is_folder(train.checkpoint_store, run_dir):
        raise ValueError(
            f"train.checkpoint_store={train.checkpoint_store} is the run folder itself; give another place"
        )
    own = latest_checkpoint(run_dir)
    if own is None and train.checkpoint_store is not None:
        own = _from_store(train.checkpoint_store, run_dir, train.resume)
    if own is not None:
        if train.resume == "never":
            raise ValueError(
                f"{run_dir} holds {own.name} and train.resume=never would train over it; choose another run.dir or "
                "train.resume=auto"
            )
        start = Start(_newest_whole(own))
    elif train.init_from is not None:
        start = Start(_initial_weights(train.init_from, run_dir), weights_only=True, data=False)
    elif train.resume in ("auto", "never"):
        return Start(None)
    else:
        start = Start(_of_another_run(train.resume, run_dir / "resume"), data=train.resume_data, branches=True)
    if own is None:
        check_checkpoint(start.checkpoint)
    return start._replace(changes=_changes(start, config))


def _is_folder(url: str, folder: Path) -> bool:
    return Path(re.sub("^(file|local)://", "", url)).resolve() == folder.resolve()


def _from_store(url: str, run_dir: Path, resume: str) -> Path | None:
    """The newest whole checkpoint of the run's own store, copied into its folder; None where there is none."""
    if resume == "never":
        if names := by_first(RemoteStore(url).complete):
            raise ValueError(
                f"{url} holds {names[-1]} and train.resume=never would train over it; choose another "
                "train.checkpoint_store or train.resume=auto"
            )
        return None
    found = by_first(partial(fetch_checkpoint, url, run_dir, RUN_FILES))
    if found is not None and rank() == 0:
        print(f"{run_dir} has no checkpoint; copied {found.name} from {url}", flush=True)
    return found


def _of_another_run(source: str, copies: Path) -> Path:
    """The checkpoint that a path or a URL means. One from a URL is copied into the folder `copies`, and stays there."""
    if "://" not in source:
        return find_checkpoint(source)
    found = by_first(partial(fetch_checkpoint, source, copies))
    if found is None:
        raise ValueError(
            f"{source} holds no checkpoint; give the URL of a run's train.checkpoint_store, or of a checkpoint"
        )
    return found


def _initial_weights(given: str, run_dir: Path) -> Path:
    """The checkpoint that train.init_from means; of an export it is made, once, in RUN/init_from."""
    from titans_pretrain.hf.importing import is_export

    if "://" in given or not is_export(given):
        return _of_another_run(given, run_dir / "init_from")
    by_first(partial(_import_alone, given, run_dir / "init_from"))
    return find_checkpoint(run_dir / "init_from")


def _import_alone(source: str, folder: Path) -> None:
    """`titans-pretrain import` in a process of its own, whose memory holds the whole model while no other does. Raises ValueError."""
    if Path(source).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"train.init_from={source} lies where its copy goes; move it out of {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "titans_pretrain", "import", source, str(folder)]
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    ended = subprocess.run(command, env=alone, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:] or [f"the import ended with {ended.returncode}"]
        raise ValueError(f"train.init_from={source}: {last[0].removeprefix('error: ')}")


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
    layers = config.model.layer_configs
    used = {"model.memory.": any(c.has_memory for c in layers), "model.mac.": any(c.has_segments for c in layers)}
    of_no_layer = tuple(group for group, any_layer in used.items() if not any_layer)
    changed = {k: v for k, v in changed.items() if not k.startswith(of_no_layer)}
    model = {k: v for k, v in changed.items() if k.startswith("model.") and k not in may_differ}
    if model:
        told = ", ".join(f"{key} is {old} there and {new} here" for key, (old, new) in model.items())
        advice = (
            "a second stage trains the same model"
            if start.weights_only
            else "give what is there, or choose another run.dir"
        )
        raise ValueError(f"{start.checkpoint} was written by another model: {told}; {advice}")
    if "train.optimizer" in changed and not start.weights_only:
        old, new = changed["train.optimizer"]
        raise ValueError(
            f"{start.checkpoint} has the moments of train.optimizer={old}, not of {new}: keep {old}, or give a new run.dir and "
            f"train.init_from={start.checkpoint} (the weights alone)"
        )
    return tuple(f"{k}: {old} -> {new}" for k, (old, new) in changed.items() if not k.startswith(_NOT_TOLD))
