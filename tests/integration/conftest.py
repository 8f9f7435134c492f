import random
from pathlib import Path

import pytest

from titans_pretrain.data_prep import cli as data_cli


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data folder of bytes: documents of 20 to 2000, so that rows hold several and some fill several rows."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = ["memory", "learns", "while", "it", "reads", "and", "forgets", "the", "rest"]
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(" ".join(draw.choice(words) for _ in range(draw.randint(4, 300))))
    arguments = ["tokenize", str(folder), "--suffix", ".txt", "--tokenizer", "byte", "--out", str(folder / "data")]
    with pytest.raises(SystemExit) as e:
        data_cli.main([*arguments, "--validation", "0.2", "--workers", "1"])
    assert not e.value.code
    return folder / "data"
