"""Hugging Face configuration of a Titans model."""

import dataclasses
from typing import ClassVar

from transformers import PreTrainedConfig

from titans_pretrain.config.model import MacConfig, MemoryConfig, ModelConfig

CACHE_NAMES = ("cache", "past_key_values")  # of one thing: from transformers 5.24 on, and before


class TitansConfig(PreTrainedConfig):
    """`ModelConfig`'s fields (see there) under their own names, with the usual Hugging Face names beside them.

    `memory.chunk_size` and `mac.segment` are part of the function that the weights were trained for: another value is
    another model. max_position_embeddings: tokens of a row in training, for tools that ask; the model has no limit.
    """

    model_type = "titans"
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(CACHE_NAMES)
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "intermediate_size": "ffn_dim",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "tie_word_embeddings": "tie_embeddings",
        "initializer_range": "init_std",
        "rms_norm_eps": "norm_eps",
    }

    def __init__(
        self,
        memory: dict | None = None,
        mac: dict | None = None,
        use_cache: bool = True,
        max_position_embeddings: int = 2048,
        **kwargs,
    ):
        for usual, name in self.attribute_map.items():  # before other sizes follow from these
            if usual in kwargs:
                value = kwargs.pop(usual)
                if kwargs.setdefault(name, value) != value:
                    raise ValueError(
                        f"{usual} is {value} and {name} {kwargs[name]}; they are one setting, give one of them"
                    )
        own = {field.name: kwargs.pop(field.name) for field in dataclasses.fields(ModelConfig) if field.name in kwargs}
        model = ModelConfig(memory=MemoryConfig(**memory or {}), mac=MacConfig(**mac or {}), **own)  # checks the values
        self.__dict__.update(vars(model))
        self.use_cache = use_cache
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """A config.json has all values that there were: one that is missing is what the model did before it was a choice."""
        before = {"memory": {"damping": 0.0}, "mac": {"residual": False}}
        known = {name: first | config_dict[name] for name, first in before.items() if config_dict.get(name)}
        return super().from_dict(config_dict | known, **kwargs)

    @classmethod
    def from_model_config(cls, config: ModelConfig, **kwargs) -> "TitansConfig":
        return cls(**dataclasses.asdict(config), **kwargs)

    def model_config(self) -> ModelConfig:
        return ModelConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ModelConfig)})

    def to_dict(self) -> dict:
        nested = {name: dataclasses.asdict(getattr(self, name)) for name in ("memory", "mac")}
        return super().to_dict() | nested
