"""The Hugging Face configuration holds a ModelConfig, whole."""

import dataclasses

import pytest

from titans_pretrain.config.model import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.hf.configuration_titans import TitansConfig

UNUSUAL = ModelConfig(
    variant="mac",
    dim=96,
    layers=3,
    heads=6,
    vocab_size=77,
    window=None,
    persistent_tokens=5,
    tie_embeddings=False,
    memory=MemoryConfig(heads=3, depth=1, chunk_size=8, residual_norm=False, forget_to="zero", step="telescoped"),
    mac=MacConfig(segment=24, memory_tokens=2),
)


@pytest.mark.parametrize("config", [ModelConfig(), UNUSUAL], ids=["default", "unusual"])
def test_every_field_survives_the_file(config, tmp_path):
    TitansConfig.from_model_config(config, eos_token_id=4).save_pretrained(tmp_path)
    read = TitansConfig.from_pretrained(tmp_path)
    assert read.model_config() == config
    assert read.eos_token_id == 4


def test_usual_names_mean_ours():
    config = TitansConfig.from_model_config(UNUSUAL)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (96, 3, 6)
    assert config.intermediate_size == UNUSUAL.ffn_dim and config.tie_word_embeddings is False


def test_no_field_hides_behind_one_of_the_library():
    from transformers import PreTrainedConfig

    ours = {field.name for field in dataclasses.fields(ModelConfig)}
    assert not ours & (set(vars(PreTrainedConfig())) - {"vocab_size"})


def test_values_are_checked():
    with pytest.raises(ValueError, match="model.variant is 'mambo'"):
        TitansConfig(variant="mambo")
    with pytest.raises(ValueError, match="model.memory.chunk_size must be positive"):
        TitansConfig(memory={"chunk_size": 0})


def test_usual_names_count_before_sizes_follow_from_them():
    usual, ours = TitansConfig(hidden_size=128, num_hidden_layers=2), TitansConfig(dim=128, layers=2)
    assert usual.model_config() == ours.model_config() == ModelConfig(dim=128, layers=2)
    assert TitansConfig(tie_word_embeddings=False).tie_embeddings is False
    with pytest.raises(ValueError, match="hidden_size is 128 and dim 64; they are one setting"):
        TitansConfig(hidden_size=128, dim=64)
