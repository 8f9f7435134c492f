"""A trained model as a folder that Hugging Face transformers loads without this package.

config.json, generation_config.json, model*.safetensors     as transformers writes them
configuration_titans.py, modeling_titans.py, ...            the model's own source files (see bundle.py)
tokenizer.json, tokenizer_config.json, ...                  the run's tokenizer
README.md                                                   model card
titans_export.json                                          names of all these files
"""

import dataclasses
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from titans_pretrain.checkpoint import find_checkpoint, find_tokenizer, load_model, read_trainer
from titans_pretrain.checkpoint.store import atomic_folder
from titans_pretrain.config.model import VARIANTS, ModelConfig
from titans_pretrain.data.tokenizer import read_tokenizer_entry
from titans_pretrain.hf.bundle import bundle_sources
from titans_pretrain.hf.model_card import model_card

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MARKER = "titans_export.json"
BLOCKS = sorted(
    {"titans_pretrain.models." + v.block.rpartition(".")[0] for v in VARIANTS.values() if isinstance(v.block, str)}
)
CODE = ("titans_pretrain.hf.configuration_titans", *BLOCKS, "titans_pretrain.hf.modeling_titans")
AUTO_MAP = {
    "AutoConfig": "configuration_titans.TitansConfig",
    "AutoModel": "modeling_titans.TitansModel",
    "AutoModelForCausalLM": "modeling_titans.TitansForCausalLM",
}


def export_checkpoint(
    source: str | Path, out_dir: str | Path, dtype: str = "float32", *, average: bool = False
) -> Path:
    """Exports a run folder (its newest checkpoint) or a checkpoint folder; see `export_model`. average: the average of its weights
    (`train.ema`); ValueError where there is none."""
    checkpoint = find_checkpoint(source)
    check_target(Path(out_dir), dtype)  # before the weights are read
    tokenizer_dir = find_tokenizer(checkpoint)
    model, config = load_model(checkpoint, average)
    trainer = read_trainer(checkpoint)
    trained = f"{config.run.name}, step {trainer['step']}" + (", average of the weights" if average else "")
    return export_model(
        model, config.model, tokenizer_dir, out_dir, dtype, trained=trained, row_length=config.data.seq_len
    )


def export_model(
    model: nn.Module,
    model_config: ModelConfig,
    tokenizer_dir: str | Path,
    out_dir: str | Path,
    dtype: str = "float32",
    *,
    trained: str = "",
    row_length: int | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes `out_dir`, whole or not at all, and returns it. The model itself stays as it is.

    model: of `build_model(model_config)`. tokenizer_dir: as `titans-data tokenizer` writes it. dtype: of the weights, a key
    of DTYPES. trained: what the model card says of the weights' origin. row_length: tokens of a row in training, for tools that ask
    (`max_position_embeddings`). Weights larger than `max_shard_size` become several files.

    Raises ValueError when `out_dir` holds anything but an earlier export, which is replaced; when the tokenizer has more
    tokens than the model; when a weight is not finite in `dtype`.
    """
    from transformers import GenerationConfig

    from titans_pretrain.hf.configuration_titans import TitansConfig
    from titans_pretrain.hf.modeling_titans import TitansForCausalLM

    out_dir, tokenizer_dir = Path(out_dir), Path(tokenizer_dir)
    check_target(out_dir, dtype)
    for name in model_config.variants:
        if not isinstance(VARIANTS[name].block, str):
            raise ValueError(
                f"variant {name!r} is not part of this package, so its code cannot be exported: see docs/adding-a-variant.md"
            )
    tokenizer = read_tokenizer_entry(tokenizer_dir)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"{tokenizer_dir} has {tokenizer.vocab_size} tokens, the model {model_config.vocab_size}: it is not the "
            "tokenizer that the model was trained with"
        )
    weights = {exported_name(name): _cast(name, x, DTYPES[dtype]) for name, x in model.state_dict().items()}
    parameters = sum(x.numel() for x in weights.values())
    # how fast it runs is for the machine that loads it to say
    memory = dataclasses.replace(model_config.memory, backend="auto", checkpoint_every=None)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.filler_id}
    model_config = dataclasses.replace(model_config, memory=memory, attention_backend="auto")
    lengths = {} if row_length is None else {"max_position_embeddings": row_length}
    config = TitansConfig.from_model_config(model_config, **ids, **lengths)
    config.auto_map = AUTO_MAP
    config.dtype = DTYPES[dtype]
    with torch.device("meta"):
        wrapper = TitansForCausalLM(config).to(DTYPES[dtype])  # whose dtype config.json tells
    wrapper.generation_config = GenerationConfig(**ids)

    with atomic_folder(out_dir.absolute()) as folder:
        _copy_tokenizer(tokenizer_dir, folder)
        wrapper.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
        for name, source in bundle_sources(*CODE).items():
            (folder / name).write_text(source, encoding="utf-8")
        (folder / "README.md").write_text(model_card(model_config, dtype, parameters, trained), encoding="utf-8")
        files = sorted([*os.listdir(folder), MARKER])
        marker = {"titans_pretrain": version("titans-pretrain"), "files": files}
        (folder / MARKER).write_text(json.dumps(marker, indent=1))
        for file in files:  # safetensors makes files that only their owner reads; the umask says what these may be
            shutil.copymode(folder / MARKER, folder / file)
    return out_dir


def check_target(out_dir: Path, dtype: str) -> None:
    """Raises ValueError unless `out_dir` is free to be written, or holds nothing but an earlier export."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; legal are {', '.join(DTYPES)}")
    if not out_dir.exists():
        return
    if not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file; give a folder to write")
    there = set(os.listdir(out_dir))
    if not there:
        return
    if MARKER not in there:
        raise ValueError(f"{out_dir} is not empty and no earlier export; give a new folder")
    others = sorted(there - set(json.loads((out_dir / MARKER).read_text())["files"]))
    if others:
        raise ValueError(f"{out_dir} is an earlier export, but {others[0]} in it is not from there; give a new folder")


def exported_name(name: str) -> str:
    """Of a parameter of the model."""
    return name if name.startswith("lm_head.") else "model." + name


def _copy_tokenizer(tokenizer_dir: Path, folder: Path) -> None:
    for file in tokenizer_dir.iterdir():
        shutil.copyfile(file, folder / file.name)
    config = folder / "tokenizer_config.json"
    # The library's Trainer counts every label but a row's first column: with padding on the left also the first tokens of rows,
    # which nothing predicts, so that the loss would depend on how the rows were batched.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": "right"}, indent=1))


def _cast(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    y = x.detach().to(dtype) if x.is_floating_point() else x.detach()
    if not torch.isfinite(y).all():
        raise ValueError(f"{name} holds values that are not finite in {dtype}; nothing is written")
    return y.contiguous()
