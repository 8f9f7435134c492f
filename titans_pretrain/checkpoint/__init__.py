from titans_pretrain.checkpoint.state import (
    check_checkpoint,
    load_checkpoint,
    load_initial,
    load_model,
    load_weights,
    model_tensors,
    read_tensors,
    read_trainer,
    save_checkpoint,
)
from titans_pretrain.checkpoint.store import (
    checkpoint_name,
    checkpoints,
    clear_leftovers,
    find_checkpoint,
    find_tokenizer,
    latest_checkpoint,
)
from titans_pretrain.checkpoint.together import DamagedCheckpoint

__all__ = [
    "DamagedCheckpoint",
    "check_checkpoint",
    "checkpoint_name",
    "checkpoints",
    "clear_leftovers",
    "find_checkpoint",
    "find_tokenizer",
    "latest_checkpoint",
    "load_checkpoint",
    "load_initial",
    "load_model",
    "load_weights",
    "model_tensors",
    "read_tensors",
    "read_trainer",
    "save_checkpoint",
]
