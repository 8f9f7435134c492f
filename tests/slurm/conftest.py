import sys
from pathlib import Path

import pytest
from cluster import Slurm, why_not
from trainings import PATIENCE, STEPS, losses, submit

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


@pytest.fixture(scope="session")
def uninterrupted(slurm, data, tmp_path_factory) -> dict[int, float]:
    """The losses of a training on two nodes that nothing interrupts."""
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    job, log = submit(slurm, data, run, f"train.steps={STEPS}")
    assert slurm.ends(job, PATIENCE, log) == "COMPLETED", log.read_text()
    assert slurm.job(job)["Restarts"] == "0"
    assert "on 2 processes (dp 2)" in log.read_text()
    assert (run / f"jobs/{job}/rank-1.log").exists()
    for node in ("n1", "n2"):
        record = (run / f"jobs/{job}/environment-{node}-0.txt").read_text()
        assert f"SLURM_JOB_ID={job}" in record and "\ntorch==" in record
    found = losses(run)
    assert list(found) == list(range(1, STEPS + 1))
    return found
