from titans_pretrain.config.load import changed_keys, flatten, load_config, save_config
from titans_pretrain.config.model import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.config.run_folder import load_run_config, refuse_commands
from titans_pretrain.config.schema import Config, DataConfig, ParallelConfig, RunConfig, TrainConfig

__all__ = [
    "Config",
    "DataConfig",
    "MacConfig",
    "MemoryConfig",
    "ModelConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "changed_keys",
    "flatten",
    "load_config",
    "load_run_config",
    "refuse_commands",
    "save_config",
]
