from titans_pretrain.checkpoint.state import (
    load_checkpoint,
    load_model,
    load_weights,
    model_tensors,
    read_tensors,
    read_trainer,
    save_checkpoint,
)
from titans_pretrain.checkpoint.store import (
    checkpoint_name,
    clear_leftovers,
    find_checkpoint,
    find_tokenizer,
    latest_checkpoint,
)

__all__ = [
    "checkpoint_name",
    "clear_leftovers",
    "find_checkpoint",
    "find_tokenizer",
    "latest_checkpoint",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "model_tensors",
    "read_tensors",
    "read_trainer",
    "save_checkpoint",
]
