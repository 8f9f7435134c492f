"""A DeepSpeed that trains with wrong gradients is refused, whoever installed it."""

import re
from pathlib import Path

import pytest

from titans_pretrain.parallel import zero


@pytest.mark.parametrize("old", ["0.18.9", "0.19.7"])
def test_an_old_deepspeed_is_refused(old, monkeypatch):
    monkeypatch.setattr(zero, "version", lambda name: old)
    with pytest.raises(ValueError, match=f"DeepSpeed {old} is installed.*pip install deepspeed==0.19.8"):
        zero.load_deepspeed()


def test_the_bound_is_that_of_the_package():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.search(r'"deepspeed==([\d.]+)"', text)[1] == str(zero.OLDEST_DEEPSPEED)
