"""An exported folder, or what a fine-tuning with Hugging Face transformers saved, as the model that this package trains.

Reads config.json and safetensors and runs no code of the folder. The weights come back to the bit.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from titans_pretrain.checkpoint import save_checkpoint
from titans_pretrain.config import Config, DataConfig, RunConfig, save_config
from titans_pretrain.config.load import upgraded
from titans_pretrain.config.model import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.config.schema import CONFIG_VERSION
from titans_pretrain.data.tokenizer import ENTRY
from titans_pretrain.models import TitansForCausalLM, build_model

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def is_export(folder: str | Path) -> bool:
    """Does the folder hold a model for Hugging Face transformers?"""
    return (Path(folder) / "config.json").is_file()


def load_export(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> tuple[TitansForCausalLM, ModelConfig]:
    """The model of an exported folder, in evaluation mode, and its config. dtype: of the weights, None: as they are stored.

    Raises ValueError for a folder of another kind of model, and for weights that do not fit its config."""
    folder = Path(folder)
    config = read_model_config(folder)
    weights = _weights(folder)
    with torch.device("meta"):
        model = build_model(config)
    expected = {name: x.shape for name, x in model.state_dict().items()}
    head, embedding = weights.get("lm_head.weight"), weights.get("embed_tokens.weight")
    if config.tie_embeddings and head is not None and embedding is not None and torch.equal(head, embedding):
        del weights["lm_head.weight"]  # saved twice by some
    found = {name: x.shape for name, x in weights.items()}
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        has, needs = (None if shape is None else list(shape) for shape in (found.get(odd[0]), expected.get(odd[0])))
        adapter = "; merge adapters first (merge_and_unload)" if "lora_" in odd[0] or "base_layer" in odd[0] else ""
        raise ValueError(
            f"{folder} does not fit its config.json: {len(odd)} tensors differ, the first is {odd[0]} ({has} there, {needs} "
            f"expected){adapter}"
        )
    dtype = next(iter(weights.values())).dtype if dtype is None else dtype
    model.load_state_dict({name: x.to(dtype) for name, x in weights.items()}, assign=True)
    return model.requires_grad_().eval(), config


def read_model_config(folder: Path) -> ModelConfig:
    """Of config.json. Raises ValueError if that is of another kind of model."""
    path = folder / "config.json"
    try:
        given = json.loads(path.read_text())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON: {e}") from None
    if not isinstance(given, dict) or given.get("model_type") != "titans":
        kind = given.get("model_type") if isinstance(given, dict) else None
        raise ValueError(f"{folder} holds a model of the kind {kind!r}, not an export of titans-pretrain")
    own = {f.name: given[f.name] for f in dataclasses.fields(ModelConfig) if f.name in given}
    try:
        own = upgraded({"version": _version(own), "model": own})["model"]
        own |= {"memory": MemoryConfig(**own.get("memory") or {}), "mac": MacConfig(**own.get("mac") or {})}
        return ModelConfig(**own)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}: {e}") from None


def _version(model: dict) -> int:
    """Of the config that an export was made of, told by what it does not know yet."""
    for version, group, key in ((1, "memory", "damping"), (2, "mac", "residual")):
        if model.get(group) and key not in model[group]:
            return version
    return CONFIG_VERSION


def import_export(folder: str | Path, run_dir: str | Path, tokenizer: str | Path | None = None) -> Path:
    """Writes RUN with one checkpoint, of step 0: the folder's weights in float32, and an optimizer before its first step.

    tokenizer: a folder as `titans-data tokenizer` writes it; None: the export's own, if it has one. Returns the checkpoint. Raises
    ValueError, also where RUN holds anything."""
    folder, run_dir = Path(folder), Path(run_dir)
    if not is_export(folder):
        raise ValueError(
            f"{folder} holds no config.json; give a folder of `titans-pretrain export` or of save_pretrained"
        )
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ValueError(f"{run_dir} is not empty; give a new folder")
    source = Path(folder if tokenizer is None else tokenizer)
    if tokenizer is not None and not (source / ENTRY).is_file():
        raise ValueError(f"{source} is not a tokenizer folder; make one with `titans-data tokenizer`")
    checkpoint = write_checkpoint(folder, run_dir)
    if (source / ENTRY).is_file():
        (run_dir / "tokenizer").mkdir()
        for name in (ENTRY, "tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, run_dir / "tokenizer" / name)
    return checkpoint


def write_checkpoint(folder: Path, run_dir: Path) -> Path:
    """The checkpoint of `import_export`, in RUN/checkpoints, and RUN/config.yaml."""
    model, model_config = load_export(folder)
    config = Config(model=model_config, data=DataConfig(), run=RunConfig(name=run_dir.name, dir=str(run_dir)))
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    numbers = {"step": 0, "tokens": 0, "validated": 0, "reader": {}}
    checkpoint = save_checkpoint(run_dir, config, model, optimizer, numbers)
    save_config(config, run_dir / "config.yaml")
    return checkpoint


def _weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor by its name in the model."""
    from safetensors.torch import load_file

    files = [WEIGHTS]
    if (folder / INDEX).is_file():
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in files:
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise ValueError(f"{path} is not there; weights are read from safetensors files in the folder alone")
        weights |= load_file(path)
    # "model.lm_head.weight": exports of the first versions
    return {name.removeprefix("model."): x for name, x in weights.items()}
