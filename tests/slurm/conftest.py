import sys
from pathlib import Path

import pytest
from cluster import Slurm, why_not

from titans_pretrain.data_prep import cli as data_cli


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A running Slurm of this test process alone: it takes a second to start, and two have nothing in common."""
    if reason := why_not():
        pytest.skip(reason)
    with Slurm(tmp_path_factory.mktemp("slurm") / "it") as running:
        running.env |= {
            "PATH": f"{Path(sys.executable).parent}:{running.env['PATH']}",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",  # the nodes are this machine
            "DS_ACCELERATOR": "cpu",
        }
        yield running


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of 40 text files of 60 to 230 bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(" ".join(f"word{(i * j) % 17}" for j in range(10 + 4 * (i % 7))))
    return folder


@pytest.fixture(scope="session")
def data(corpus, tmp_path_factory) -> Path:
    """The corpus as a data folder of bytes."""
    out = tmp_path_factory.mktemp("data") / "data"
    arguments = ["tokenize", str(corpus), "--suffix", ".txt", "--tokenizer", "byte", "--out", str(out)]
    with pytest.raises(SystemExit) as e:
        data_cli.main([*arguments, "--validation", "0.05", "--workers", "1"])
    assert not e.value.code
    return out
