"""Composition, overrides and the messages of titans_pretrain.config."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from titans_pretrain import cli
from titans_pretrain.commands.config import as_text
from titans_pretrain.config import (
    Config,
    ModelConfig,
    changed_keys,
    load_config,
    load_run_config,
    refuse_commands,
    save_config,
)
from titans_pretrain.config.keys import all_keys
from titans_pretrain.config.load import load_as
from titans_pretrain.evaluation.train_synthetic import SyntheticConfig
from titans_pretrain.forecasting.config import ForecastConfig
from titans_pretrain.genomics.config import ClassifyConfig

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def small(write):
    return write("small.yaml", "model: {dim: 64, layers: 2, heads: 2, memory: {heads: 2}}\ntrain: {lr: 3e-4}\n")


def test_an_empty_file_gives_the_defaults(write):
    config = load_config(write("empty.yaml", ""))
    assert config.model == ModelConfig()
    assert (config.run.name, config.run.dir) == ("empty", "runs/empty")


def test_numbers_in_scientific_notation_are_numbers(small):
    assert load_config(small).train.lr == 3e-4
    assert load_config(small, ["train.min_lr=1e-6"]).train.min_lr == 1e-6


def test_later_wins_key_by_key(write, small):
    """Includes in order, then the file, then the overrides; paths are relative to the file that includes."""
    write("parts/one.yaml", "train: {steps: 1, seed: 1, micro_batch: 1, global_batch: 1}\n")
    write("parts/two.yaml", "include: [one.yaml]\ntrain: {seed: 2, micro_batch: 2, global_batch: 2}\n")
    top = write("top.yaml", "include: [small.yaml, parts/two.yaml]\ntrain: {micro_batch: 3, global_batch: 3}\n")
    train = load_config(top, ["train.global_batch=6"]).train
    assert (train.steps, train.seed, train.micro_batch, train.global_batch) == (1, 2, 3, 6)
    assert load_config(top).model.dim == 64


def test_an_include_that_comes_back_is_refused(write):
    write("a.yaml", "include: [b.yaml]\n")
    b = write("b.yaml", "include: [a.yaml]\n")
    with pytest.raises(ValueError, match="includes itself: .*b.yaml -> .*a.yaml -> .*b.yaml"):
        load_config(b)


def test_values_may_refer_to_others(small):
    assert load_config(small, ["run.name=x", "run.dir=/scratch/${run.name}"]).run.dir == "/scratch/x"


def test_a_saved_config_loads_as_itself(small, tmp_path):
    config = load_config(small, ["model.variant=mac", "data.mixture={a/b.c: 2, d: 1}", "model.window=null"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_changed_keys_names_both_values(small):
    old, new = load_config(small), load_config(small, ["train.lr=1", "model.memory.depth=1"])
    assert changed_keys(old, new) == {"train.lr": (3e-4, 1.0), "model.memory.depth": (2, 1)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key train.stepz; did you mean train.steps?"),
        ("train.seq_len=3", "unknown key train.seq_len; did you mean data.seq_len?"),
        ("model.vocabsize=3", "unknown key model.vocabsize; did you mean model.vocab_size?"),
        ("chunk_size=3", "unknown key chunk_size; did you mean model.memory.chunk_size?"),
        ("qqq.abc=1", "unknown key qqq; legal here: model, data, train, parallel, run, deepspeed, version"),
        ("train.steps=4x", "train.steps = '4x': must be an integer"),
        ("train.steps='4'", "train.steps = '4': must be an integer"),
        ("train.steps=1.5", "train.steps = 1.5: must be an integer"),
        ("train.steps=true", "train.steps = True: must be an integer"),
        ("train.lr=fast", "train.lr = 'fast': must be a number"),
        ("model.window=wide", "model.window = 'wide': must be an integer or null"),
        ("model.tie_embeddings=1", "model.tie_embeddings = 1: must be true or false"),
        ("model.variant=mamba", "model.variant is 'mamba'; legal are lmm, mac, mag, mal, transformer"),
        ("train.precision=fp16", "train.precision = 'fp16': must be fp32 or bf16"),
        ("data.mixture={a: x}", "data.mixture.a = 'x': must be a valid number"),
        ("data.mixture={a: 0}", "data.mixture gives 'a' the weight 0.0; weights must be positive"),
        ("model=3", "model = 3: must be a group of keys"),
        ("train.lr=-1", "train.lr must be 0 or more, got -1.0"),
        ("train.lr=.nan", "train.lr must be 0 or more, got nan"),
        ("train.min_lr=1", "train.min_lr=1.0 is above train.lr=0.0003"),
        ("train.beta2=1", r"train.beta2 must lie in [0, 1), got 1.0"),
        ("train.micro_batch=3", "train.global_batch=8 must be a multiple of train.micro_batch=3; try 9"),
        ("data.seq_len=0", "data.seq_len must be 1 or more, got 0"),
        ("data.seq_len=100", "data.seq_len=100 must be a multiple of model.memory.chunk_size=16"),
        ("data.seq_len=8", "try 16, or data.reset_documents=false"),
        ("parallel.tp=0", "parallel.tp must be 1 or more, got 0"),
        ("parallel.zero_stage=4", "parallel.zero_stage = 4: must be 0 or 1 or 2 or 3"),
        (
            "version=99",
            "version 99 is newer than version 3, the newest this titans-pretrain reads; update titans-pretrain",
        ),
        ("run.dir=${nothing}", "Interpolation key 'nothing' not found"),
        ("train.steps", "override 'train.steps' is not of the form key=value"),
        ("train.lr=[1", "the value of override 'train.lr=[1' is not valid YAML"),
    ],
)
def test_a_bad_override_is_one_clear_line(small, override, message):
    with pytest.raises(ValueError) as e:
        load_config(small, [override])
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_seq_len_is_a_multiple_of_the_segment_for_mac(small):
    with pytest.raises(
        ValueError, match="data.seq_len=528 must be a multiple of model.mac.segment=512, .* try 512 or 1024"
    ):
        load_config(small, ["model.variant=mac", "data.seq_len=528"])
    assert (
        load_config(small, ["model.variant=mac", "data.seq_len=528", "data.reset_documents=false"]).data.seq_len == 528
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", dict(damping=0.0, step="plain", max_lr=0.1)),
        ("model: {memory: {max_lr: 0.3, step: plain}}", dict(damping=0.0, step="plain", max_lr=0.3)),
        (
            "model: {memory: {residual_norm: false, step: telescoped, max_lr: 0.4}}",
            dict(damping=0.0, step="telescoped", step_coefficient=2.0, max_lr=0.4, residual_norm=False),
        ),
    ],
)
def test_version_1_keeps_its_inner_step(write, text, expected):
    """A file that a run of version 1 left means the function that was trained, not today's defaults."""
    config = load_config(write("old.yaml", f"version: 1\n{text}\n"))
    assert {key: getattr(config.model.memory, key) for key in expected} == expected
    assert config.version == 3
    memory = load_config(write("new.yaml", "train: {seed: 1}\n")).model.memory
    assert (memory.damping, memory.step, memory.largest_lr) == (1.0, "relative", 3.4)


@pytest.mark.parametrize("version", [1, 2])
def test_before_version_3_mac_wrote_what_attention_gave_alone(write, version):
    old = load_config(
        write("old.yaml", f"version: {version}\nmodel: {{pattern: [{{variant: mac, mac: {{segment: 32}}}}]}}\n")
    )
    assert [(layer.mac.segment, layer.mac.residual) for layer in old.model.layer_configs[:1]] == [(32, False)]
    assert load_config(write("new.yaml", "train: {seed: 1}\n")).model.mac.residual
    again = load_config(write("again.yaml", f"version: {version}\nmodel: {{mac: {{residual: true}}}}\n"))
    assert again.model.mac.residual


def test_version_1_with_a_step_that_is_gone(write):
    with pytest.raises(
        ValueError, match="model.memory.step=telescoped with residual_norm was another step in version 1"
    ):
        load_config(write("old.yaml", "version: 1\nmodel: {memory: {step: telescoped}}\n"))


def test_newer_versions_are_refused_before_their_new_keys(write):
    with pytest.raises(ValueError, match="version 4 is newer than version 3"):
        load_config(write("new.yaml", "version: 4\ntrain: {something_new: 1}\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1", "not valid YAML"),
        ("- a\n- b\n", "must hold `key: value` lines"),
        ("train: {steps: 1, steps: 2}\n", "duplicate key steps"),
        ("include: other.yaml\n", "include is 'other.yaml'; it must be a list of file names"),
        ("train:\n", "train = None: must be a group of keys"),
    ],
)
def test_a_bad_file_is_one_clear_line(write, text, message):
    path = write("bad.yaml", text)
    with pytest.raises(ValueError) as e:
        load_config(path)
    assert message in str(e.value)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_a_missing_file_names_its_neighbours(small):
    with pytest.raises(FileNotFoundError, match="no config file .*smal.yaml; near names: .*small.yaml"):
        load_config(small.with_name("smal.yaml"))


def test_a_missing_include_names_who_asks_for_it(write):
    path = write("top.yaml", "include: [gone.yaml]\n")
    with pytest.raises(FileNotFoundError, match=r"no config file .*gone.yaml \(included from .*top.yaml\)"):
        load_config(path)


def test_importing_the_config_loads_no_heavy_package():
    code = (
        "import sys, titans_pretrain.config; print([m for m in ('torch', 'pydantic', 'omegaconf') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def schema_of(path: Path) -> type:
    """Of a shipped file: what the command that reads it takes."""
    name = path.relative_to(CONFIGS).with_suffix("").as_posix()
    if name.startswith("genomics/") and name not in ("genomics/model", "genomics/pretrain", "genomics/human"):
        return ClassifyConfig
    if name.startswith("synthetic/"):
        return SyntheticConfig
    return ForecastConfig if name.startswith("forecasting/") else Config


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_config_of_the_project_loads(path):
    schema = schema_of(path)
    assert isinstance(load_as(schema, path), schema)


def test_the_documentation_lists_every_key_with_its_default_and_meaning():
    text = (CONFIGS.parent / "docs/configuration.md").read_text()
    found = re.findall(r"^\| `[\w.]+` \| `.*?` \|.*", text, re.MULTILINE)
    keys = {name: key for name, key in all_keys().items() if name != "version"}
    expected = [f"| `{name}` | `{as_text(key.default)}` | {key.meaning} |" for name, key in keys.items()]
    assert all(key.meaning for key in keys.values()), "say in the schema what a key means: setting(default, meaning)"
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(("page", "schema"), [("time-series", ForecastConfig), ("genomics", ClassifyConfig)])
def test_the_pages_of_other_schemas_list_their_keys(page, schema):
    docs = CONFIGS.parent / "docs"
    elsewhere = ("model.", "train.") if page == "genomics" else ("model.",)
    found = re.findall(r"^\| `[\w.]+` \| `.*?` \|.*", (docs / f"{page}.md").read_text(), re.MULTILINE)
    keys = {name: key for name, key in all_keys(schema).items() if not name.startswith(elsewhere)}
    expected = [f"| `{name}` | `{as_text(key.default)}` | {key.meaning} |" for name, key in keys.items()]
    assert sorted(found) == sorted(expected)


def test_another_schema_has_its_own_keys_and_its_own_defaults(write):
    path = write("mine.yaml", "series:\n  lookback: 48\n  path: ${run.name}.csv\ntrain: {lr: 2e-3}\n")
    config = load_as(ForecastConfig, path, ["model.variant=lmm"])
    assert (config.series.lookback, config.series.path, config.train.lr) == (48, "mine.csv", 2e-3)
    assert (config.model.variant, config.run.dir) == ("lmm", "runs/mine")
    with pytest.raises(ValueError, match=r"unknown key data; legal here: series, model, train, run"):
        load_as(ForecastConfig, path, ["data.path=x"])
    with pytest.raises(ValueError, match=r"unknown key train\.lookback; did you mean series\.lookback\?"):
        load_as(ForecastConfig, path, ["train.lookback=3"])
    with pytest.raises(
        ValueError, match=r"override 'series\.split=none': series\.split = 'none': must be auto or ett_hourly"
    ):
        load_as(ForecastConfig, path, ["series.split=none"])
    with pytest.raises(ValueError, match=r"unknown key series"):
        load_config(path)


def test_config_lists_every_key_as_an_override_says_it(small, capsys):
    assert cli.main(["config"]) == 0
    plain = capsys.readouterr().out
    assert [line.partition("=")[0] for line in plain.splitlines() if line] == list(all_keys())
    assert re.search(r"^train\.lr=0\.0004 +peak learning rate$", plain, re.MULTILINE)
    assert re.search(r"^model\.ffn_dim=null ", plain, re.MULTILINE)
    overrides = [line.split("  ")[0].rstrip() for line in plain.splitlines() if line]
    assert load_config(None, overrides).model == ModelConfig()
    assert cli.main(["config", str(small), "train.seed=3"]) == 0
    found = capsys.readouterr().out
    assert re.search(r"^train\.seed=3 +of the initial .* \(default 0\)$", found, re.MULTILINE)
    assert re.search(r"^train\.lr=0\.0003 .* \(default 0\.0004\)$", found, re.MULTILINE)
    assert cli.main(["config", "train.seed=3"]) == 0
    assert "train.seed=3 " in capsys.readouterr().out


def test_home_and_relative_folders(small, tmp_path, monkeypatch):
    """Written down so that they mean the same from anywhere; what is no folder of this machine stays as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = load_config(
        small, ["data.path=~/corpus", "run.dir=~/r/${run.name}", "data.cache_dir=c", "train.resume=~/old"]
    )
    assert (config.data.path, config.run.dir) == (f"{tmp_path}/home/corpus", f"{tmp_path}/home/r/small")
    assert (config.data.cache_dir, config.train.resume) == (f"{tmp_path}/c", f"{tmp_path}/home/old")
    assert load_config(small, ["data.path=../x/"]).data.path == str(tmp_path.parent / "x")
    for path in ("pipe:cat ~/{}", "s3://bucket/~/x", "https://a/b/../c"):
        assert load_config(small, [f"data.path={path}"]).data.path == path
    mixture = load_config(small, ["data.mixture={a: 2, ~/b: 1, s3://c: 3}"]).data.mixture
    assert mixture == {f"{tmp_path}/a": 2, f"{tmp_path}/home/b": 1, "s3://c": 3}
    assert (load_config(small).train.resume, load_config(small, ["train.resume=never"]).train.resume) == (
        "auto",
        "never",
    )
    with pytest.raises(ValueError, match=r"override 'data.mixture=.*': data.mixture names .*/a twice"):
        load_config(small, ["data.mixture={a: 2, ./a: 1}"])
    with pytest.raises(
        ValueError, match="~nobody-here/x: there is no such home folder; a folder of that name is ./~nobody"
    ):
        load_config(small, ["run.dir=~nobody-here/x"])


def test_the_command_line_knows_the_home_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["report", "~/gone"]) == 2
    assert f"{tmp_path}/gone is not a run folder" in capsys.readouterr().err


def test_values_may_refer_to_defaults(small, write):
    assert load_config(small, ["run.dir=/scratch/${run.name}"]).run.dir == "/scratch/small"
    config = load_config(write("d.yaml", "train: {min_lr: '${train.lr}', seed: '${model.memory.depth}'}\n"))
    assert (config.train.min_lr, config.train.seed, config.run.dir) == (4e-4, 2, "runs/d")
    assert load_config(small, ["run.name=x", "data.cache_dir=/c/${run.dir}"]).data.cache_dir == "/c/runs/x"


@pytest.mark.parametrize(
    ("overrides", "blamed"),
    [
        (["train.seed=1", "train.stepz=3"], "override 'train.stepz=3': unknown key train.stepz; did you mean train.steps?"),
        (["train.lr=x", "train.steps=y"], "override 'train.steps=y': train.steps = 'y': must be an integer"),
        (["model.variant=mac", "data.seq_len=528"], "overrides 'model.variant=mac' and 'data.seq_len=528': data.seq_len=528 must"),
        (["train.lr=1e-9", "train.seed=1"], "override 'train.lr=1e-9': train.min_lr=1e-05 is above train.lr=1e-09"),
        (["train.steps=1", "train.steps=x", "train.steps=y"], "override 'train.steps=y': train.steps = 'y': must be an integer"),
        (["model.pattern=[mag]", "model.pattern.0=mac"], "override"),
    ],
)  # fmt: skip
def test_an_error_blames_the_override_without_which_it_would_not_be(small, overrides, blamed):
    with pytest.raises(ValueError) as e:
        load_config(small, overrides)
    assert str(e.value).startswith(blamed)


def test_an_error_of_the_file_blames_the_file(write):
    path = write("bad.yaml", "train: {steps: x}\n")
    with pytest.raises(ValueError, match=r"^\S*bad.yaml: train.steps = 'x': must be an integer"):
        load_config(path, ["train.seed=1", "run.name=y"])
    assert load_config(path, ["train.steps=1"]).train.steps == 1


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--train.lr=3"], "unrecognized arguments: --train.lr=3; settings have no dashes: train.lr=3"),
        (["--lr", "3"], "settings have no dashes: train.lr=3"),
        (["--global-batch=4", "train.seed=1"], "settings have no dashes: train.global_batch=4"),
        (["--zzz"], "unrecognized arguments: --zzz"),
    ],
)
def test_a_setting_given_as_an_option_is_shown_in_its_form(small, capsys, arguments, hint):
    with pytest.raises(SystemExit) as e:
        cli.main(["plan", str(small), *arguments])
    assert e.value.code == 2
    assert capsys.readouterr().err.strip().endswith(hint)


def test_the_config_of_a_run_folder_looks_nothing_up(tmp_path, monkeypatch):
    """It may be someone else's: their config must not reach this machine's secrets. What save_config wrote loads."""
    monkeypatch.setenv("SECRET", "s3cret")
    (tmp_path / "config.yaml").write_text("data: {path: 'https://elsewhere/${oc.env:SECRET}', cache_dir: /c}\n")
    assert load_config(tmp_path / "config.yaml").data.path.endswith("s3cret")  # a user's own file may
    for text in ("${oc.env:SECRET}", r"\\${oc.env:SECRET}", "a${${x}:SECRET}"):
        (tmp_path / "config.yaml").write_text(f"data: {{path: 'https://elsewhere/{text}', cache_dir: /c}}\n")
        with pytest.raises(
            ValueError, match=r"config.yaml: .*SECRET.* refers to another value, which nothing in a run folder"
        ):
            load_run_config(tmp_path, ["train.seed=1"])
    config = load_config(None, [r"data.path='pipe:cat \${DIR}/{}'"])
    assert config.data.path == "pipe:cat ${DIR}/{}"
    save_config(config, tmp_path / "config.yaml")
    assert load_run_config(tmp_path).data.path == "pipe:cat ${DIR}/{}"


def test_the_config_of_a_run_folder_stands_alone_and_is_no_larger_than_it_looks(tmp_path):
    """Ten aliases of ten aliases ..., nine times, are a billion values."""
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    (tmp_path / "other.yaml").write_text("train: {seed: 3}\n")
    for text, told in ((bomb, "has a YAML alias, which nothing"), ("include: [other.yaml]\n", "includes other.yaml")):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"{told}.*run folder"):
            load_run_config(tmp_path)
    assert load_config(tmp_path / "config.yaml").train.seed == 3  # a user's own file may


def test_commands_of_a_run_folder_are_run_only_if_given_again(tmp_path):
    config = load_config(None, ["data.path=pipe:cat {}"])
    with pytest.raises(
        ValueError, match="own config reads its data by 'pipe:cat {}'; to allow it, give it again: 'data.path=pipe:"
    ):
        refuse_commands(config)
    with pytest.raises(ValueError, match="own config reads"):
        refuse_commands(config, ["data.path=pipe:dog {}", "run.name=pipe:cat {}", "data=${x}", "data.mixture=null"])
    refuse_commands(config, ["train.seed=1", "data.path=pipe:cat {}"])
    config.data.path = r"pipe:cat ${DIR}/{}"
    refuse_commands(config, [r"data.path=pipe:cat \${DIR}/{}"])
    config.data.path, config.data.mixture = None, {"/a": 1.0, "reference::https://x/y.json": 2.0}
    with pytest.raises(ValueError, match="reads its data by 'reference::"):
        refuse_commands(config, ["data.mixture={/a: 1}"])
    refuse_commands(config, ["data.mixture={'reference::https://x/y.json': 2}"])
    config.data.mixture = {"s3://bucket/x": 1.0}
    refuse_commands(config)
