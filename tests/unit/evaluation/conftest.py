import pytest
import torch

from titans_pretrain.config.model import MemoryConfig, ModelConfig
from titans_pretrain.data_prep.tokenizer import ByteTokenizer
from titans_pretrain.evaluation import model as evaluated
from titans_pretrain.evaluation.model import LanguageModel
from titans_pretrain.models import build_model


@pytest.fixture(scope="session")
def lm(tmp_path_factory) -> LanguageModel:
    """A model of bytes that was not trained. Its weights are large, so that what it says depends on what it read."""
    folder = tmp_path_factory.mktemp("tokenizer")
    ByteTokenizer().save(folder)
    torch.manual_seed(0)
    memory = MemoryConfig(heads=2, expansion=2.0, chunk_size=8)
    config = ModelConfig(
        variant="mag", dim=32, layers=2, heads=2, vocab_size=264, window=16, persistent_tokens=2, ffn_dim=48, memory=memory,
        init_std=0.3,
    )  # fmt: skip
    return LanguageModel(build_model(config), lambda: folder)


@pytest.fixture
def short_pieces(monkeypatch):
    """Long inputs go through the model 24 tokens at a time."""
    monkeypatch.setattr(evaluated, "PIECE", 24)


class Documents:
    """What a task reads in the place of a file or the run's data."""

    def __init__(self, *texts: str):
        self.texts = texts

    def identity(self, path):
        return "these"

    def documents(self, path, tokenizer):
        yield from map(tokenizer.encode, self.texts)


@pytest.fixture
def documents():
    return Documents
