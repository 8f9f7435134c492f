"""Runs and data that do not belong together, or that come from somebody else."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from titans_pretrain import cli
from titans_pretrain.commands.train import copy_tokenizer
from titans_pretrain.config import load_config
from titans_pretrain.data import build_reader
from titans_pretrain.data.tokenizer import read_tokenizer_entry
from titans_pretrain.data_prep.tokenizer import load_tokenizer

TINY = Path(__file__).parents[2] / "configs/tiny.yaml"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "run"
    overrides = ["train.steps=1", "train.eval_every=0", "train.global_batch=1", "train.micro_batch=1"]
    assert cli.main(["train", str(TINY), f"data.path={data}", f"run.dir={folder}", *overrides]) == 0
    return folder


def with_tokenizer(data: Path, kind: str, folder: Path) -> Path:
    """A copy of the data whose manifest and tokenizer are of another kind, as if it had been made anew."""
    shutil.copytree(data, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "tokenizer")
    tokenizer = load_tokenizer(kind)
    tokenizer.save(folder / "tokenizer")
    manifest = json.loads((folder / "manifest.json").read_text()) | {"tokenizer": asdict(tokenizer.entry)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_eval_refuses_data_of_another_tokenizer(run, data, tmp_path, capsys):
    other = with_tokenizer(data, "nucleotide", tmp_path / "other")
    assert cli.main(["eval", str(run), f"data.path={other}"]) == 2
    said = capsys.readouterr()
    assert "trained on tokens of byte of 259 ids" in said.err and "nucleotide of 8 ids" in said.err and not said.out


def test_the_command_of_a_foreign_run_is_not_run(run, data, tmp_path, capsys):
    """Neither as the path nor in a mixture; what the user gives is."""
    foreign, mark = tmp_path / "run", tmp_path / "PWNED"
    command = f"pipe:touch {mark}; cat {data}/{{}}"
    for text in (f'path: "{command}"', f'path: null\n  mixture: {{"{command}": 1.0}}'):
        shutil.rmtree(foreign, ignore_errors=True)
        shutil.copytree(run, foreign)
        for config in foreign.rglob("config.yaml"):
            was = config.read_text()
            assert f"path: {data}" in was and "\n  mixture: {}" in was
            text = text.replace("path: null", "path:")
            was = was.replace("\n  mixture: {}", "") if "mixture" in text else was
            config.write_text(
                was.replace(f"path: {data}", text).replace("cache_dir: null", f"cache_dir: {tmp_path}/cache")
            )
        assert cli.main(["report", str(foreign)]) == 0
        said = capsys.readouterr().out
        assert "not known: the run's own config reads its data by" in said or "mixture" in text
        assert cli.main(["eval", str(foreign)]) == 2
        assert "the run's own config reads its data by 'pipe:touch" in capsys.readouterr().err
        assert cli.main(["eval", str(foreign), f"data.cache_dir={tmp_path}/cache"]) == 2
        assert not mark.exists()
    shutil.rmtree(foreign)
    shutil.copytree(run, foreign)
    assert cli.main(["eval", str(foreign), f"data.path={command}", f"data.cache_dir={tmp_path}/cache"]) == 0
    assert mark.exists()


def test_a_run_gets_the_tokenizer_of_the_data_as_it_is_now(data, tmp_path):
    """Not one that the cache has of data that stood there before; and what does not fit the manifest replaces nothing."""
    served, target = tmp_path / "served", tmp_path / "run" / "tokenizer"
    path, cache = f"pipe:cat {served}/{{}} 2>/dev/null", tmp_path / "cache"
    config = load_config(TINY, [f"data.path={path}", f"data.cache_dir={cache}"])
    for kind in ("byte", "nucleotide"):
        with_tokenizer(data, kind, served)
        build_reader(config)
        copy_tokenizer(config, target.parent)
        assert read_tokenizer_entry(target).kind == kind
    load_tokenizer("byte").save(served / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer is byte of 259 ids.*the manifest says nucleotide of 8 ids"):
        copy_tokenizer(config, target.parent)
    assert read_tokenizer_entry(target).kind == "nucleotide" and list(target.parent.iterdir()) == [target]
