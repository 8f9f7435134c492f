"""A model's state in a file: a long text is read once and asked about later, by another process, in any number of rows.

safetensors: every tensor of the state by its place in it, e.g. layers.0.memory.memory.weights.1; in the metadata the state's structure
and the fingerprint of the model that read. What the parameters alone decide, the memory before a document, is left out.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from titans_pretrain.config.model import ModelConfig
from titans_pretrain.kernels.memory_scan import MemoryState, StepHistory
from titans_pretrain.models.state import LayerState, MemoryLayerState, ModelState, SegmentState

VERSION = "1"
KINDS = {
    kind.__name__: kind for kind in (ModelState, LayerState, MemoryLayerState, MemoryState, StepHistory, SegmentState)
}


def fingerprint(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of what the model computes: config but for speed, and every weight to the bit."""
    function: dict = dataclasses.asdict(config)
    del function["attention_backend"], function["memory"]["backend"], function["memory"]["checkpoint_every"]
    digest = hashlib.sha256(json.dumps(function, sort_keys=True).encode())
    for name, x in sorted(weights.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_state(path: str | Path, state: ModelState, model: str) -> None:
    """Writes the file whole or not at all. model: the fingerprint of the one that read."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    structure = _taken_apart(state, "", tensors)
    metadata = {"titans_state": VERSION, "model": model, "structure": json.dumps(structure)}
    path = Path(path)
    temporary = path.with_name(f".writing-{path.name}")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: str | Path, model: str, device: torch.device | str = "cpu") -> ModelState:
    """Raises ValueError for a file of another kind, and for the state of another model than the one with this fingerprint."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no state file {path}")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("titans_state") != VERSION:
                raise ValueError(f"{path} holds no state of a Titans model that this version reads")
            if metadata["model"] != model:
                raise ValueError(
                    f"{path} was read by another model (its config or its weights differ); read the text again with this one"
                )
            return _put_together(json.loads(metadata["structure"]), file.get_tensor)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} is damaged, or no state file ({' '.join(str(e).split())[:200]})") from e


def _taken_apart(value, place: str, tensors: dict[str, Tensor]):
    """The structure as JSON has it; tensors by name go into `tensors`."""
    if isinstance(value, Tensor):
        tensors[place] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": place}
    inside = f"{place}." if place else ""
    if isinstance(value, tuple):
        return [_taken_apart(x, f"{inside}{i}", tensors) for i, x in enumerate(value)]
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if f.name != "initial"]
        parts = {name: _taken_apart(getattr(value, name), f"{inside}{name}", tensors) for name in names}
        return {"kind": type(value).__name__, **parts}
    assert value is None or isinstance(value, bool | int), value
    return value


def _put_together(structure, tensor):
    if isinstance(structure, list):
        return tuple(_put_together(x, tensor) for x in structure)
    if not isinstance(structure, dict):
        return structure
    if "tensor" in structure:
        return tensor(structure["tensor"])
    kind = KINDS[structure["kind"]]
    return kind(**{name: _put_together(x, tensor) for name, x in structure.items() if name != "kind"})
