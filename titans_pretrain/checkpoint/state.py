"""What a checkpoint holds: full-shape tensors by parameter name, random states, and the trainer's few numbers.

model.safetensors       parameters and persistent buffers (a tied tensor once)
optimizer.safetensors   "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME" for every trained parameter NAME
rng.pt                  random states of torch, CUDA, numpy and Python
trainer.json            step, tokens, the reader's cursor
config.yaml             the resolved config
"""

import json
import random
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from titans_pretrain.checkpoint.store import (
    atomic_folder,
    checkpoint_name,
    find_checkpoint,
    point_latest,
    prune_checkpoints,
)
from titans_pretrain.config import Config, load_config, save_config

FORMAT_VERSION = 1


def save_checkpoint(
    run_dir: str | Path, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, trainer: dict
) -> Path:
    """Writes RUN/checkpoints/step-N atomically, points `latest` at it and clears old ones away.

    trainer: JSON-able, with the number of finished steps as "step". Raises OSError (disk full, no permission) with every
    earlier checkpoint untouched.
    """
    target = Path(run_dir) / "checkpoints" / checkpoint_name(trainer["step"])
    try:
        with atomic_folder(target) as folder:
            save_file(model_tensors(model), folder / "model.safetensors")
            save_file(_optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
            torch.save(_rng_states(), folder / "rng.pt")
            save_config(config, folder / "config.yaml")
            (folder / "trainer.json").write_text(json.dumps({"version": FORMAT_VERSION, **trainer}, indent=1))
        point_latest(target)
        prune_checkpoints(target.parent, config.train.keep_checkpoints)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors report a full disk in their own ways
        raise OSError(
            f"step {trainer['step']}: cannot write {target}: {e}; earlier checkpoints are untouched: make room there and give "
            "the same command again"
        ) from e
    return target


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Puts a checkpoint back into a model, its optimizer and the random generators; returns the trainer's numbers."""
    trainer = read_trainer(checkpoint)
    load_weights(checkpoint, model)
    _load_optimizer(optimizer, model, load_file(checkpoint / "optimizer.safetensors"), checkpoint)
    _set_rng_states(torch.load(checkpoint / "rng.pt", weights_only=True))
    return trainer


def load_model(path: str | Path) -> tuple[nn.Module, Config]:
    """The model of a run or checkpoint folder, in evaluation mode, and its config."""
    from titans_pretrain.models import build_model

    checkpoint = find_checkpoint(path)
    config = load_config(checkpoint / "config.yaml")
    model = build_model(config.model)
    load_weights(checkpoint, model)
    return model.eval(), config


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Copies a checkpoint's parameters and buffers into `model`; every one must be there and fit."""
    tensors, own = load_file(checkpoint / "model.safetensors"), model_tensors(model)
    odd = sorted(tensors.keys() ^ own.keys()) + sorted(
        n for n in tensors.keys() & own.keys() if tensors[n].shape != own[n].shape
    )
    if odd:
        raise ValueError(f"{checkpoint} does not fit the model: {len(odd)} tensors differ, the first is {odd[0]}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def read_trainer(checkpoint: Path) -> dict:
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    if trainer["version"] > FORMAT_VERSION:
        raise ValueError(
            f"{checkpoint} has format version {trainer['version']}, this titans-pretrain reads up to {FORMAT_VERSION}; update it"
        )
    return trainer


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; tensors that share memory appear under their first name only."""
    first_names: dict[int | str, str] = {}
    state = model.state_dict()
    return {n: t for n, t in state.items() if first_names.setdefault(t.data_ptr() or n, n) == n}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {p: n for n, p in model.named_parameters()}
    return {f"{key}/{names[p]}": value for p, state in optimizer.state.items() for key, value in state.items()}


def _load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor], checkpoint: Path
) -> None:
    names = {p: n for n, p in model.named_parameters()}
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        by_parameter.setdefault(name, {})[key] = tensor
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    unknown = sorted(by_parameter.keys() - set(order))
    if unknown:
        raise ValueError(f"{checkpoint} holds optimizer state of {unknown[0]}, which is not trained here")
    state = {i: by_parameter[name] for i, name in enumerate(order) if name in by_parameter}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _rng_states() -> dict:
    kind, keys, *rest = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def _set_rng_states(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    numpy.random.set_state(states["numpy"])
    random.setstate(states["python"])
