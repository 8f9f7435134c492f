"""An export back as a model and as a run: to the bit, and nothing that does not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from titans_pretrain.checkpoint import find_tokenizer, load_model, read_tensors
from titans_pretrain.config import Config, RunConfig, TrainConfig
from titans_pretrain.config.model import MemoryConfig, ModelConfig
from titans_pretrain.data_prep.tokenizer import ByteTokenizer
from titans_pretrain.hf.export import export_checkpoint, export_model
from titans_pretrain.hf.importing import import_export, load_export, read_model_config
from titans_pretrain.models import build_model
from titans_pretrain.training.start import find_start

CONFIG = ModelConfig(
    pattern=["mag", {"variant": "lmm", "memory": {"chunk_size": 8}}], dim=16, layers=2, heads=2, vocab_size=259, window=8,
    tie_embeddings=False, memory=MemoryConfig(heads=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model, its export in several files)"""
    folder = tmp_path_factory.mktemp("exported")
    ByteTokenizer().save(folder / "tokenizer")
    torch.manual_seed(0)
    model = build_model(CONFIG)
    return model, export_model(model, CONFIG, folder / "tokenizer", folder / "out", max_shard_size="20KB")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def test_a_run_and_its_export_are_one_model_to_the_bit(exported, tmp_path):
    model, folder = exported
    checkpoint = import_export(folder, tmp_path / "run")
    read, config = load_model(tmp_path / "run")
    assert config.model == CONFIG and same(read.state_dict(), model.state_dict())
    moments = {name: x for name, x in read_tensors(checkpoint).items() if name.startswith("exp_avg")}
    assert len(moments) == 2 * len(model.state_dict()) and not any(x.any() for x in moments.values())
    assert find_tokenizer(tmp_path / "run").is_dir()
    again = export_checkpoint(tmp_path / "run", tmp_path / "again")
    files = [
        {n: x for file in out.glob("*.safetensors") for n, x in load_file(file).items()} for out in (folder, again)
    ]
    assert same(*files)
    with pytest.raises(ValueError, match="run is not empty; give a new folder"):
        import_export(folder, tmp_path / "run")


def test_what_the_library_saves_is_read(exported, tmp_path):
    from titans_pretrain.hf.modeling_titans import TitansForCausalLM

    model, folder = exported
    TitansForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(tmp_path / "tuned")
    read, _ = load_export(tmp_path / "tuned")
    assert same(read.state_dict(), {name: x.bfloat16().float() for name, x in model.state_dict().items()})
    assert {x.dtype for x in load_export(tmp_path / "tuned", dtype=None)[0].parameters()} == {torch.bfloat16}
    import_export(tmp_path / "tuned", tmp_path / "run")
    assert not (tmp_path / "run/tokenizer").exists()  # none was saved


@pytest.mark.slow
def test_a_run_starts_from_an_export(exported, tmp_path):
    model, folder = exported
    config = Config(model=CONFIG, train=TrainConfig(init_from=str(folder)), run=RunConfig(dir=str(tmp_path / "run")))
    start = find_start(config)
    assert start.weights_only and same(load_model(start.checkpoint)[0].state_dict(), model.state_dict())
    config.model = ModelConfig(variant="lmm")
    with pytest.raises(ValueError, match="was written by another model"):
        find_start(config)
    shutil.copytree(folder, tmp_path / "other/init_from")
    config.train.init_from, config.run.dir = str(tmp_path / "other/init_from"), str(tmp_path / "other")
    with pytest.raises(ValueError, match="lies where its copy goes"):
        find_start(config)
    assert (tmp_path / "other/init_from/config.json").is_file()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    config.train.init_from = str(broken)
    with pytest.raises(ValueError, match="^train.init_from=.*broken holds a model of the kind None, not an export"):
        find_start(config)


def test_what_does_not_fit_is_refused(exported, tmp_path):
    _, folder = exported
    with pytest.raises(ValueError, match="holds no config.json; give a folder of `titans-pretrain export`"):
        import_export(tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match="is not a tokenizer folder"):
        import_export(folder, tmp_path / "run", tokenizer=tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())

    def given(**changes):
        (copy / "config.json").write_text(json.dumps(config | changes))
        return load_export(copy)

    with pytest.raises(
        ValueError, match=r"tensors differ, the first is embed_tokens.weight \(\[259, 16\] there, \[300, 16\]"
    ):
        given(vocab_size=300)
    with pytest.raises(ValueError, match="holds a model of the kind 'llama', not an export"):
        given(model_type="llama")
    with pytest.raises(ValueError, match="config.json: .*model.window must be positive"):
        given(window=0)
    given()
    file = sorted(copy.glob("*.safetensors"))[0]
    tensors = {name: x.clone() for name, x in load_file(file).items()}
    save_file(tensors | {"model.layers.0.x.lora_A.weight": torch.zeros(1)}, file)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    with pytest.raises(ValueError, match="merge adapters first"):
        given()
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="from safetensors files in the folder alone"):
        given()
    assert not (tmp_path / "run").exists()


def test_the_first_versions_name_of_the_output_layer(exported, tmp_path):
    model, folder = exported
    weights = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    weights["model.lm_head.weight"] = weights.pop("lm_head.weight")
    shutil.copy(folder / "config.json", tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    assert same(load_export(tmp_path)[0].state_dict(), model.state_dict())


def test_an_export_of_before_a_choice_was_there_is_the_model_that_it_was(exported, tmp_path):
    from titans_pretrain.hf.configuration_titans import TitansConfig

    _, folder = exported
    given = json.loads((folder / "config.json").read_text())
    del given["mac"]["residual"]
    (tmp_path / "config.json").write_text(json.dumps(given))
    read = read_model_config(tmp_path)
    assert not read.mac.residual and read.memory == CONFIG.memory
    assert TitansConfig.from_pretrained(tmp_path).model_config() == read
    del given["memory"]["damping"]
    (tmp_path / "config.json").write_text(json.dumps(given))
    read = read_model_config(tmp_path)
    assert read.memory.damping == 0 and not read.mac.residual
    assert TitansConfig.from_pretrained(tmp_path).model_config() == read


def test_a_tied_output_layer_that_was_saved_twice(exported, tmp_path):
    _, folder = exported
    weights = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    config = json.loads((folder / "config.json").read_text()) | {"tie_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="1 tensors differ, the first is lm_head.weight"):  # not the embedding
        load_export(tmp_path)
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    assert load_export(tmp_path)[0].lm_head is None
