"""Layers that differ: `model.pattern`, what a layer makes of it, and what it survives."""

import json

import pytest

from titans_pretrain.config import Config, MacConfig, MemoryConfig, ModelConfig, changed_keys, load_config, save_config
from titans_pretrain.config.model import VARIANTS
from titans_pretrain.config.schema import DataConfig, ParallelConfig, RunConfig, TrainConfig

BASE = dict(dim=64, layers=6, heads=4, window=128)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("model: {dim: 64, layers: 6, heads: 4, window: 128, memory: {heads: 2}}\n")
    return path


def test_no_pattern_is_the_pattern_of_one():
    plain, one = ModelConfig("mal", **BASE), ModelConfig("lmm", pattern=["mal"], **BASE)
    assert plain.layer_configs == one.layer_configs and len(plain.layer_configs) == 6
    assert plain.variants == ("mal",)


def test_entries_repeat_and_inherit_what_they_leave_out():
    memory = {"depth": 1, "chunk_size": 24}
    full = {"variant": "transformer", "window": None, "heads": 8, "kv_heads": 2, "qk_norm": True, "ffn_dim": 80}
    c = ModelConfig("lmm", pattern=["mag", full, {"memory": memory, "persistent_tokens": 0}, "mal"], **BASE)
    layers = c.layer_configs
    assert [x.variant for x in layers] == ["mag", "transformer", "lmm", "mal", "mag", "transformer"]
    assert c.layer(4) == layers[0] and c.layer(5) == layers[1]
    assert [x.window for x in layers[:4]] == [128, None, 128, 128]
    assert (layers[1].heads, layers[1].kv_heads, layers[1].head_dim, layers[1].qk_norm) == (8, 2, 8, True)
    assert (layers[0].heads, layers[0].kv_heads, layers[0].head_dim, layers[0].qk_norm) == (4, 4, 16, False)
    assert (layers[1].ffn_dim, layers[2].ffn_dim) == (80, 192)
    assert layers[2].memory == MemoryConfig(depth=1, chunk_size=24) and layers[3].memory == MemoryConfig()
    assert (layers[2].persistent_tokens, layers[3].persistent_tokens) == (0, 16)
    assert c.variants == ("mag", "transformer", "lmm", "mal")
    assert (c.has_memory, c.has_attention) == (True, True)
    assert c.document_multiple == 48  # of chunks of 16 and 24


def test_what_is_derived_follows_the_entry():
    """head_dim from its heads, kv_heads from its heads, g of the telescoped step from its norm, ffn_dim from the width."""
    entry = {"heads": 8, "ffn_dim": None, "memory": {"residual_norm": False, "step": "telescoped"}}
    c = ModelConfig(pattern=[entry], ffn_dim=100, **BASE)
    layer = c.layer(0)
    assert (layer.head_dim, layer.kv_heads, layer.ffn_dim) == (8, 8, 192)
    assert layer.memory.telescope_coefficient == MemoryConfig(residual_norm=False).telescope_coefficient
    assert layer.memory.telescope_coefficient != c.memory.telescope_coefficient
    assert ModelConfig(pattern=[{"heads": 8}], head_dim=32, **BASE).layer(0).head_dim == 32
    assert ModelConfig(pattern=[{"heads": 8, "head_dim": None}], head_dim=32, **BASE).layer(0).head_dim == 8


def test_documents_start_where_every_layer_can():
    c = ModelConfig(pattern=[{"variant": "mac", "mac": {"segment": 48}}, {"memory": {"chunk_size": 64}}], **BASE)
    assert [x.document_multiple for x in c.layer_configs[:2]] == [48, 64] and c.document_multiple == 192
    assert ModelConfig(pattern=["transformer"], **BASE).document_multiple == 1


ENTRIES = [
    ("[mag, magg]", "model.pattern[1].variant is 'magg'; legal are lmm, mac, mag, mal, transformer; did you mean mag?"),
    ("[{windw: 3}]", "unknown key model.pattern[0].windw; did you mean window?"),
    ("[{memory: {dept: 3}}]", "unknown key model.pattern[0].memory.dept; did you mean depth?"),
    ("[{mac: {zzz: 3}}]", "unknown key model.pattern[0].mac.zzz; legal here: segment, memory_tokens, residual"),
    ("[{vocab_size: 3}]", "unknown key model.pattern[0].vocab_size; legal here: variant, window, heads"),
    ("[{pattern: [mag]}]", "unknown key model.pattern[0].pattern"),
    ("[lmm, {memory: {depth: 0}}]", "model.pattern[1].memory.depth must be positive, got 0"),
    ("[{memory: {step: telescope}}]", "model.pattern[0].memory.step = 'telescope': must be plain or telescoped"),
    ("[{window: wide}]", "model.pattern[0].window = 'wide': must be an integer or null"),
    ("[{window: 0}]", "model.pattern[0].window must be positive, got 0"),
    ("[{heads: 3}]", "model.dim=64 is not divisible by model.pattern[0].heads=3"),
    ("[{kv_heads: 3}]", "model.heads=4 is not divisible by model.pattern[0].kv_heads=3"),
    ("[{qk_norm: 1}]", "model.pattern[0].qk_norm = 1: must be true or false"),
    ("[{variant: mac, mac: {segment: 24}}]", "model.pattern[0].mac.segment=24 must be a multiple of model.memory.chunk_size=16"),
    ("[{memory: 3}]", "model.pattern[0].memory = 3: must be a group of keys"),
    ("[{memory: {backend: chunked}}]", "model.pattern[0].memory.backend says how a layer computes, not what"),
    ("[{attention_backend: sdpa}]", "model.pattern[0].attention_backend says how a layer computes, not what"),
    ("[3]", "model.pattern[0] = 3: must be the name of a variant, or a mapping with a layer's own keys"),
    ("[]", "model.pattern has 0 entries; give between 1 and model.layers=6"),
    ("[lmm, lmm, lmm, lmm, lmm, lmm, lmm]", "model.pattern has 7 entries; give between 1 and model.layers=6"),
    ("mag", "model.pattern = 'mag': must be a list or null"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), ENTRIES, ids=[text for text, _ in ENTRIES])
def test_a_bad_entry_is_one_clear_line_that_names_its_key(file, text, message):
    with pytest.raises(ValueError) as e:
        load_config(file, [f"model.pattern={text}"])
    assert message in str(e.value) and "\n" not in str(e.value)


def test_what_an_entry_inherits_is_named_where_it_stands(file):
    with pytest.raises(
        ValueError, match=r": model.dim=64 is not divisible by model.memory.heads=5 \(in model.pattern\[0\]\)$"
    ):
        load_config(file, ["model.pattern=[mag]", "model.memory.heads=5"])
    assert load_config(file, ["model.pattern=[{memory: {heads: 4}}]", "model.memory.heads=5"]).model.layers == 6


def test_a_pattern_survives_overrides_files_and_comparisons(file, tmp_path):
    text = "[mag, {variant: transformer, window: null, memory: {max_lr: 0.5}}]"
    config = load_config(file, [f"model.pattern={text}"])
    assert config.model.pattern == ["mag", {"variant": "transformer", "window": None, "memory": {"max_lr": 0.5}}]
    save_config(config, tmp_path / "config.yaml")
    read = load_config(tmp_path / "config.yaml")
    assert read == config and read.model.layer_configs == config.model.layer_configs
    assert changed_keys(config, load_config(file)).keys() == {"model.pattern"}
    assert load_config(tmp_path / "config.yaml", ["model.pattern=null"]).model.variants == ("mag",)


def test_an_override_that_reaches_into_a_pattern_is_one_clear_line(file):
    with pytest.raises(ValueError, match="an override cannot reach into a list, give all of it"):
        load_config(file, ["model.pattern=[mag]", "model.pattern.0=mal"])
    with pytest.raises(ValueError, match="model.pattern = .*: must be a list or null"):
        load_config(file, ["model.pattern.0=mal"])


def test_rows_are_as_long_as_the_layers_need(file):
    with pytest.raises(
        ValueError, match="data.seq_len=4096 must be a multiple of the least common multiple .*=48, .* try 4080 or 4128"
    ):
        load_config(file, ["model.pattern=[mag, {memory: {chunk_size: 24}}]"])


def test_a_pattern_survives_a_hugging_face_config(tmp_path):
    from titans_pretrain.hf.configuration_titans import TitansConfig

    c = ModelConfig(pattern=["mag", {"variant": "transformer", "window": None, "heads": 8}], kv_heads=2, **BASE)
    TitansConfig.from_model_config(c).save_pretrained(tmp_path)
    read = TitansConfig.from_pretrained(tmp_path)
    assert read.model_config() == c and read.num_key_value_heads == 2
    assert json.loads((tmp_path / "config.json").read_text())["pattern"] == c.pattern


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: MemoryConfig(step="telescope"), "model.memory.step = 'telescope': must be plain or telescoped or relative; did you mean telescoped?"),
        (lambda: MemoryConfig(forget_to="initials"), "model.memory.forget_to = 'initials': must be zero or initial; did you mean initial?"),
        (lambda: MemoryConfig(backend="fast"), "model.memory.backend = 'fast': must be auto or triton or chunked or reference"),
        (lambda: ModelConfig(attention_backend="flash_attn"), "model.attention_backend = 'flash_attn': must be auto or flash_attn_2"),
        (lambda: MemoryConfig(residual_norm="no"), "model.memory.residual_norm = 'no': must be true or false"),
        (lambda: MemoryConfig(depth=2.0), "model.memory.depth = 2.0: must be an integer"),
        (lambda: MemoryConfig(depth=True), "model.memory.depth = True: must be an integer"),
        (lambda: MemoryConfig(max_lr=float("nan")), "model.memory.max_lr must be 0 or more, got nan"),
        (lambda: MacConfig(segment="all"), "model.mac.segment = 'all': must be an integer"),
        (lambda: ModelConfig("mgg"), "model.variant is 'mgg'; legal are lmm, mac, mag, mal, transformer; did you mean mag?"),
        (lambda: ModelConfig(memory={"heads": 2}), "model.memory = {'heads': 2}: must be a MemoryConfig"),
        (lambda: ModelConfig(window="full"), "model.window = 'full': must be an integer or null"),
        (lambda: DataConfig(on_bad_shard="halt"), "data.on_bad_shard = 'halt': must be stop or skip"),
        (lambda: TrainConfig(precision="fp16"), "train.precision = 'fp16': must be fp32 or bf16; did you mean bf16?"),
        (lambda: TrainConfig(recompute="blocks"), "train.recompute = 'blocks': must be none or block or segment; did you mean block?"),
        (lambda: TrainConfig(device="gpu"), "train.device = 'gpu': must be auto or cpu or cuda"),
        (lambda: TrainConfig(lr="1e-3"), "train.lr = '1e-3': must be a number"),
        (lambda: ParallelConfig(zero_stage=4), "parallel.zero_stage = 4: must be 0 or 1 or 2 or 3"),
        (lambda: ParallelConfig(zero_stage=True), "parallel.zero_stage = True: must be 0 or 1 or 2 or 3"),
        (lambda: ParallelConfig(memory_split="head"), "parallel.memory_split = 'head': must be heads or hidden; did you mean heads?"),
        (lambda: RunConfig(tensorboard=1), "run.tensorboard = 1: must be true or false"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_where_a_config_is_made_in_python(make, told):
    with pytest.raises(ValueError) as e:
        make()
    assert told in str(e.value)


def test_every_variant_says_what_it_is_made_of():
    from titans_pretrain.models.variants import build_block

    for name, variant in VARIANTS.items():
        block = build_block(ModelConfig(name, **BASE).layer(0))
        assert hasattr(block, "memory") == variant.memory and hasattr(block, "attention") == variant.attention
        assert variant.summary


def test_what_a_version_chose_is_written_down(tmp_path, monkeypatch):
    """A saved model stays what it is when a later version has other defaults."""
    plain = {"memory": {"step": "plain"}}
    c = Config(model=ModelConfig(pattern=["mag", plain, {"memory": {"depth": 1}}], **BASE))
    assert [x.memory.max_lr for x in c.model.layer_configs[:3]] == [3.4, 1.6, 3.4] and plain == {
        "memory": {"step": "plain"}
    }
    save_config(c, tmp_path / "config.yaml")
    monkeypatch.setattr(MemoryConfig, "largest_lr", property(lambda m: 9.0 if m.max_lr is None else m.max_lr))
    assert MemoryConfig().max_lr == 9.0  # the later version
    loaded = load_config(tmp_path / "config.yaml").model
    assert loaded == c.model
    assert [x.memory.max_lr for x in loaded.layer_configs[:3]] == [3.4, 1.6, 3.4]


def test_a_changed_memory_follows_its_step_where_it_was_left_to_it():
    assert MemoryConfig().changed(step="plain") == MemoryConfig(step="plain")
    assert MemoryConfig(max_lr=0.3).changed(step="plain") == MemoryConfig(step="plain", max_lr=0.3)
    assert MemoryConfig().changed(step="telescoped", residual_norm=False, depth=1).max_lr == 0.5
