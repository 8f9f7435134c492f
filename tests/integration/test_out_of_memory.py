"""What a training says that runs out of memory: a simulated error of a GPU, and real ones of this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from titans_pretrain import cli
from titans_pretrain.commands.out_of_memory import allocators_words
from titans_pretrain.commands.outlook import needed_memory
from titans_pretrain.config import load_config
from titans_pretrain.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/tiny.yaml"
TOLD = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
CHOICE = re.compile(r"^((?:[a-z]+\.[a-z_]+=\S+ ?)+?) +([\d,]+) MiB: (.+)$", re.MULTILINE)


def mib(parts: dict[str, float]) -> str:
    return f"{sum(parts.values()) / 2**20:,.0f}"


@pytest.mark.slow
def test_the_settings_that_need_less_are_named_with_the_numbers_of_plan(data, tmp_path, monkeypatch, capsys):
    """Every number again, from the settings as they are printed."""

    def fails(trainer):
        raise torch.OutOfMemoryError(TOLD)

    monkeypatch.setattr(Trainer, "train_step", fails)
    settings = [
        "train.micro_batch=12",
        "train.global_batch=24",
        "data.seq_len=512",
        f"data.path={data}",
        f"run.dir={tmp_path}",
    ]
    assert cli.main(["train", str(TINY), *settings]) == 2
    told = capsys.readouterr().err
    assert "out of memory: CUDA out of memory\nmemory of a process, estimated\n" in told
    last = told.splitlines()[-1]
    assert last.startswith(
        "error: out of memory: CUDA out of memory; with one of the settings above the same command goes on"
    )
    now = needed_memory(load_config(TINY, settings), 1)
    for name, size in now.items():
        assert re.search(rf"^{name} +{size / 2**20:,.0f} MiB$", told, re.MULTILINE), told
    assert re.search(rf"^all +{mib(now)} MiB$", told, re.MULTILINE)
    found = CHOICE.findall(told)
    assert {"train.micro_batch=6", "train.recompute=block"} <= {choice.strip() for choice, *_ in found}
    totals = []
    for choice, total, change in found:
        then = needed_memory(load_config(TINY, [*settings, *choice.split()]), 1)
        assert total == mib(then), choice
        for name, by in re.findall(r"([a-z ,]+?) ([+-][\d,]+) MiB", change):
            name = name.removeprefix(", ")
            assert f"{(then[name] - now[name]) / 2**20:+,.0f}" == by, (choice, name)
        totals.append(sum(then.values()))
    assert totals == sorted(totals) and totals[-1] < 0.99 * sum(now.values())


LIMITED = """
import os, resource, sys
from titans_pretrain import cli
from titans_pretrain.training.trainer import Trainer
step = Trainer.train_step
def limited(trainer):
    now = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + 600 * 2**20,) * 2)
    return step(trainer)
Trainer.train_step = limited
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_memory_that_is_really_not_there(data, tmp_path):
    """A limit of the kernel's, of 600 MiB above what the process has when its first step begins: enough for the reader's threads."""
    settings = ["train.micro_batch=256", "train.global_batch=256", "data.seq_len=512", "train.eval_every=0"]
    settings += [f"data.path={data}", f"run.dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "train", str(TINY), *settings], cwd=ROOT, capture_output=True, text=True, timeout=500,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},  # each thread would take 64 MiB of the limit
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "out of memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate" in done.stderr
    assert any(choice.strip() == "train.recompute=block" for choice, *_ in CHOICE.findall(done.stderr)), done.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError(TOLD), "CUDA out of memory"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("[enforce fail at a.cpp:1] data. DefaultCPUAllocator: not enough memory: x. Buy"), "DefaultCPUAllocator: not enough memory: x"),
        (RuntimeError("std::bad_alloc"), "std::bad_alloc"),
        (RuntimeError("shapes differ"), None),
        (ValueError("out of memory"), None),
    ],
)  # fmt: skip
def test_what_is_an_error_of_memory(error, words):
    assert allocators_words(error) == words
    try:
        try:
            raise error
        except Exception as e:
            raise RuntimeError("while the backward pass ran") from e
    except RuntimeError as outer:
        assert allocators_words(outer) == words


def test_other_errors_stay_as_they_are(data, tmp_path, monkeypatch):
    def fails(trainer):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Trainer, "train_step", fails)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main(["train", str(TINY), f"data.path={data}", f"run.dir={tmp_path}"])
