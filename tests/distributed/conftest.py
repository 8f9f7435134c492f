from pathlib import Path

import pytest
from ranks import Ranks

from titans_pretrain.data_prep import cli as data_cli


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """ranks(n): n running gloo processes, the same ones for every test; new ones after a failure."""
    running: dict[int, Ranks] = {}

    def get(world: int) -> Ranks:
        if world not in running or not running[world].alive:
            running[world] = Ranks(world, tmp_path_factory.mktemp("ranks"))
        return running[world]

    yield get
    for group in running.values():
        group.stop()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data folder of bytes: 40 documents of 60 to 230, a few of them for validation."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(" ".join(f"word{(i * j) % 17}" for j in range(10 + 4 * (i % 7))))
    arguments = ["tokenize", str(folder), "--suffix", ".txt", "--tokenizer", "byte", "--out", str(folder / "data")]
    with pytest.raises(SystemExit) as e:
        data_cli.main([*arguments, "--validation", "0.05", "--workers", "1"])
    assert not e.value.code
    return folder / "data"
