"""What is said before a run begins: memory, steps of minutes, padding, epochs."""

import logging
from pathlib import Path

import pytest
import torch

from titans_pretrain import cli
from titans_pretrain.commands import outlook
from titans_pretrain.commands.layout import build_layout
from titans_pretrain.commands.outlook import free_memory, memory_warning, run_warnings
from titans_pretrain.commands.plan import flops_per_token
from titans_pretrain.config import load_config
from titans_pretrain.data import build_reader, epoch_size

TINY = Path(__file__).parents[2] / "configs/tiny.yaml"
CPU = torch.device("cpu")


def test_nothing_is_said_of_a_run_that_fits(monkeypatch):
    config = load_config(TINY)
    assert run_warnings(config, 1e12, 1, (100_000, 150_000)) == []
    assert run_warnings(config, None, 1, (100_000, 150_000)) == []
    layout = build_layout(config, 1)
    need = sum(layout.memory(layout.fullest).values())
    for free, warned in ((need + 1, False), (need - 1, True), (None, False)):
        monkeypatch.setattr(outlook, "free_memory", lambda device, free=free: free)
        assert (memory_warning(config, CPU, 1) is not None) == warned


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    config = load_config(TINY)
    layout = build_layout(config, 2)
    need = sum(layout.memory(layout.fullest).values())
    monkeypatch.setattr(outlook, "free_memory", lambda device: 1.5 * need)
    assert memory_warning(config, CPU, 2) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "each of 2 processes needs about" in memory_warning(config, CPU, 2)


@pytest.mark.slow
def test_tensor_parallel_processes_are_counted_without_a_group_here(monkeypatch):
    config = load_config(TINY, ["parallel.tp=2"])
    layout = build_layout(config, 2)
    need = sum(layout.memory(layout.fullest).values())
    monkeypatch.setattr(outlook, "free_memory", lambda device: need - 1)
    assert f"this run needs about {need / 2**30:.1f} GiB" in memory_warning(config, CPU, 2)
    assert not torch.distributed.is_initialized()


def test_a_step_of_minutes_is_announced_with_its_numbers():
    config = load_config(TINY)
    flops = flops_per_token(config)[1] * 4 * 128
    assert run_warnings(config, flops / 59, 1, (1000, 1000)) == []
    (told,) = run_warnings(config, flops / 200, 1, (1000, 1000))
    assert told.startswith("a step takes 3:20 or more: ")
    assert run_warnings(config, flops / 200, 4, (1000, 1000)) == []


def test_padding_and_epochs_are_warned_of_with_their_numbers():
    config = load_config(TINY)  # 20 steps of 512 columns
    assert run_warnings(config, None, 1, (50, 103)) != []
    (told,) = run_warnings(config, None, 1, (1000, 100_000))
    assert told.startswith(
        "warning: 99% of what is read is padding, because a document starts at a multiple of 16 tokens only"
    )
    assert run_warnings(config, None, 1, (103, 103)) == []  # 99.4 epochs
    (told,) = run_warnings(config, None, 1, (102, 102))
    assert told.startswith("warning: 20 steps read the 102 training tokens 100 times")
    warm = load_config(TINY, ["train.batch_warmup=[[0,2],[10,4]]"])
    assert run_warnings(warm, None, 1, (102, 102)) == []  # 75 epochs


def test_the_size_of_an_epoch_is_that_of_its_rows(data):
    """Against every row of an epoch as the reader gives them; all of it lies in one shard."""
    for reset in (True, False):
        overrides = [f"data.path={data}", f"data.reset_documents={str(reset).lower()}", "train.micro_batch=1"]
        config = load_config(TINY, overrides)
        rows = [batch for batch in build_reader(config, epochs=1)]
        tokens = sum(int((batch.positions >= 0).sum()) for batch in rows)
        found = epoch_size(config)
        assert found[0] == tokens
        assert 0 <= sum(batch.tokens.numel() for batch in rows) - found[1] < 128  # the last row is filled up


def test_this_machine_has_memory():
    assert free_memory(CPU) > 2**20


def test_train_says_it_before_the_first_step(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("titans_pretrain.training.gauge.peak_flops", lambda device, precision: 1e3)
    monkeypatch.setattr(outlook, "free_memory", lambda device: 1000)
    options = [
        f"data.path={data}",
        f"run.dir={tmp_path}/run",
        "train.steps=1",
        "train.eval_every=0",
        "model.dim=32",
        "train.log_every=1",
    ]
    assert cli.main(["train", str(TINY), *options]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("warning: this run needs about ")
    assert "(parameters 0.0, " in shown.err
    lines = shown.out.splitlines()
    slow = next(i for i, line in enumerate(lines) if line.startswith("a step takes "))
    assert slow < next(i for i, line in enumerate(lines) if line.startswith("step 1/1"))


@pytest.mark.parametrize(("rank", "level"), [("0", logging.INFO), ("1", logging.NOTSET)])
def test_choices_are_logged_by_one_process(monkeypatch, rank, level):
    logger = logging.getLogger("titans_pretrain")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("titans_pretrain.commands.train.train", lambda config: 0)
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    assert cli.main(["train", str(TINY)]) == 0
    assert logger.level == level
