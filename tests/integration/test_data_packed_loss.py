"""Packed by the reader or alone: a document's loss is the same."""

import json
from types import SimpleNamespace

import pytest
import torch

from titans_pretrain.config import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.data import build_reader
from titans_pretrain.data_prep.tokenize import TokenizeOptions, tokenize
from titans_pretrain.data_prep.tokenizer import ByteTokenizer
from titans_pretrain.models import build_model

LENGTHS = [1, 2, 15, 16, 17, 40, 63, 64, 90, 127, 5, 30]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Folder and tokens of documents of many lengths."""
    folder = tmp_path_factory.mktemp("packed")
    generator = torch.Generator().manual_seed(0)
    texts = ["".join(chr(97 + int(c)) for c in torch.randint(26, (n,), generator=generator)) for n in LENGTHS]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = ByteTokenizer()
    tokenize([str(folder / "a.jsonl")], tokenizer, folder / "data", TokenizeOptions(validation=0.0))
    return folder / "data", [[*tokenizer.encode(text).tolist(), tokenizer.entry.eos_id] for text in texts]


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal", "transformer"])
def test_packed_documents_give_the_loss_of_each_alone(documents, variant):
    folder, tokens = documents
    torch.manual_seed(0)
    model_config = ModelConfig(
        variant=variant,
        dim=32,
        layers=2,
        heads=2,
        vocab_size=260,
        window=32,
        persistent_tokens=4,
        memory=MemoryConfig(heads=2, chunk_size=8),
        mac=MacConfig(segment=16),
    )
    model = build_model(model_config).double()
    config = SimpleNamespace(
        data=SimpleNamespace(
            path=str(folder),
            seq_len=128,
            mixture={},
            reset_documents=True,
            split_long_documents=False,
            cache_dir=None,
            on_bad_shard="stop",
        ),
        train=SimpleNamespace(seed=0, micro_batch=2),
        model=model_config,
    )
    with torch.no_grad():
        packed = sum(
            float(model(b.tokens, b.labels, positions=b.positions, num_items_in_batch=1).loss)
            for b in build_reader(config, epochs=1)
        )
        alone = 0.0
        for document in tokens:
            row = torch.tensor([document])
            labels = torch.cat([row[:, 1:], torch.tensor([[-100]])], 1)
            alone += float(model(row, labels, num_items_in_batch=1).loss)
    assert packed == pytest.approx(alone, rel=1e-9)
