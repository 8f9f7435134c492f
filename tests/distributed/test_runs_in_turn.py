"""Runs that follow one another in one group of processes."""

import contextlib
import io
import time

import pytest

from titans_pretrain.commands import out_of_memory
from titans_pretrain.config import Config
from titans_pretrain.parallel import watchdog


def two_runs() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watchdog, "_ENDS", 0.0)
        with pytest.raises(ValueError, match="no such file"), watchdog.Watchdog(60.0):
            raise ValueError("no such file")
        with watchdog.Watchdog(60.0):
            time.sleep(2.5)  # two looks at the others
    return "alive"


def test_the_end_of_one_run_does_not_end_the_next(ranks):
    assert ranks(2).run(two_runs) == ["alive", "alive"]


def two_without_memory() -> list[int]:
    """How often this process tells what would help, in each of two runs."""
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(out_of_memory, "advice", lambda *_: "less of it")
        for _ in range(2):
            with (
                contextlib.redirect_stderr(io.StringIO()) as said,
                pytest.raises(out_of_memory.OutOfMemory),
                out_of_memory.explained(Config(), 2),
            ):
                raise MemoryError
            told.append(said.getvalue().count("less of it"))
    return told


def test_what_would_help_is_told_once_in_every_run(ranks):
    assert [sum(told) for told in zip(*ranks(2).run(two_without_memory), strict=True)] == [1, 1]
