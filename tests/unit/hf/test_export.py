"""What an export writes, replaces and refuses to touch."""

import json

import pytest
import torch
from safetensors.torch import load_file

from titans_pretrain.config.model import MemoryConfig, ModelConfig
from titans_pretrain.data_prep.tokenizer import ByteTokenizer
from titans_pretrain.hf import export
from titans_pretrain.hf.export import export_checkpoint, export_model
from titans_pretrain.models import build_model

CONFIG = ModelConfig(
    dim=16,
    layers=1,
    heads=2,
    vocab_size=259,
    window=8,
    memory=MemoryConfig(heads=2, backend="chunked", checkpoint_every=3),
    attention_backend="sdpa",
)


@pytest.fixture
def tokenizer(tmp_path):
    ByteTokenizer().save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(CONFIG)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_weights_config_and_card(model, tokenizer, tmp_path):
    out = export_model(model, CONFIG, tokenizer, tmp_path / "a/b", trained="demo, step 3", row_length=64)
    weights = load_file(out / "model.safetensors")
    assert {"model." + name for name in model.state_dict()} == set(weights)
    assert all(torch.equal(weights["model." + name], x) for name, x in model.state_dict().items())
    config = json.loads((out / "config.json").read_text())
    assert config["variant"] == "mag" and config["dtype"] == "float32" and config["eos_token_id"] == 256
    assert config["attention_backend"] == "auto" and config["max_position_embeddings"] == 64
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    # or the loss of a Trainer's step would depend on how its rows are batched
    assert json.loads((out / "tokenizer_config.json").read_text())["padding_side"] == "right"
    assert config["memory"]["backend"] == "auto" and config["memory"]["checkpoint_every"] is None
    assert json.loads((out / "generation_config.json").read_text())["pad_token_id"] == 258
    card = (out / "README.md").read_text()
    assert "demo, step 3" in card and "chunks of 16 tokens" in card and "trust_remote_code=True" in card
    assert "tested with `torch" in card and "`, `transformers" in card
    assert (
        "cache: TitansCache" in (out / "modeling_titans.py").read_text()
    )  # docs/huggingface.md: old folders have none
    assert set(json.loads((out / export.MARKER).read_text())["files"]) == {path.name for path in out.iterdir()}
    (tmp_path / "plain").touch()  # what the umask gives
    assert {path.stat().st_mode for path in out.iterdir()} == {(tmp_path / "plain").stat().st_mode}
    assert (out / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_weights_in_bfloat16_and_in_several_files(model, tokenizer, tmp_path):
    out = export_model(model, CONFIG, tokenizer, tmp_path / "out", "bfloat16", max_shard_size="10KB")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1 and (out / "model.safetensors.index.json").exists()
    weights = {name: x for file in files for name, x in load_file(file).items()}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(torch.equal(weights["model." + name], x.bfloat16()) for name, x in model.state_dict().items())
    assert all(x.dtype == torch.float32 for x in model.parameters())  # the model itself stays


def test_an_earlier_export_is_replaced_whole(model, tokenizer, tmp_path):
    out = export_model(model, CONFIG, tokenizer, tmp_path / "out", max_shard_size="10KB")
    export_model(model, CONFIG, tokenizer, out)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_failed_export_leaves_the_earlier_one(model, tokenizer, tmp_path, monkeypatch):
    out = export_model(model, CONFIG, tokenizer, tmp_path / "out")
    before = contents(out)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "model_card", full)
    with pytest.raises(OSError, match="No space left"):
        export_model(model, CONFIG, tokenizer, out)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tokenizer"]


def test_other_files_are_not_touched(model, tokenizer, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out is not empty and no earlier export; give a new folder"):
        export_model(model, CONFIG, tokenizer, out)
    (out / "notes.txt").unlink()
    export_model(model, CONFIG, tokenizer, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes.txt in it is not from there"):
        export_model(model, CONFIG, tokenizer, out)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="is a file; give a folder"):
        export_model(model, CONFIG, tokenizer, out / "notes.txt")


def test_wrong_input_is_named(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="dtype is 'int8'; legal are float32, bfloat16, float16"):
        export_model(model, CONFIG, tokenizer, tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="has 259 tokens, the model 100"):
        export_model(model, ModelConfig(vocab_size=100), tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="is not a tokenizer folder"):
        export_model(model, CONFIG, tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no run or checkpoint folder .*gone"):
        export_checkpoint(tmp_path / "gone", tmp_path / "out")
    with torch.no_grad():
        model.layers[0].memory.q_proj.weight[1, 2] = 1e6
    with pytest.raises(
        ValueError, match="layers.0.memory.q_proj.weight holds values that are not finite in torch.float16"
    ):
        export_model(model, CONFIG, tokenizer, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()
