"""Configs by name, from any folder."""

from pathlib import Path

import pytest

from titans_pretrain.config import load_config
from titans_pretrain.config.load import flatten
from titans_pretrain.config.shipped import find_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize("name", ["tiny", "1.3b-mag", "longcontext/2m-cpu"])
def test_a_name_is_the_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert flatten(load_config(name)) == flatten(load_config(CONFIGS / f"{name}.yaml"))


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").write_text("train: {steps: 7}")
    assert load_config("tiny").train.steps == 7
    (tmp_path / "tiny").unlink()
    (tmp_path / "tiny").mkdir()
    assert find_config("tiny") == CONFIGS / "tiny.yaml"


def test_an_unknown_name_lists_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config file huge; by name there are .*laptop.*tiny"):
        load_config("huge")
