"""Runs that follow one another in one group of processes."""

import time

import pytest

from titans_pretrain.parallel import watchdog


def two_runs() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watchdog, "_ENDS", 0.0)
        return _two_runs()


def _two_runs() -> str:
    with pytest.raises(ValueError, match="no such file"), watchdog.Watchdog(60.0):
        raise ValueError("no such file")
    with watchdog.Watchdog(60.0):
        time.sleep(2.5)  # two looks at the others
    return "alive"


def test_the_end_of_one_run_does_not_end_the_next(ranks):
    assert ranks(2).run(two_runs) == ["alive", "alive"]
