"""Who is slow, of numbers that are written down; and spans, by a clock that stands still."""

import math
from types import SimpleNamespace

import pytest
import torch

from titans_pretrain.training import stopwatch as stopwatch_module
from titans_pretrain.training import stragglers
from titans_pretrain.training.stopwatch import Stopwatch
from titans_pretrain.training.stragglers import MANY, StragglersHook, slow_rank, summary


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=5.0)
    monkeypatch.setattr(stopwatch_module.time, "perf_counter", lambda: now.seconds)
    return now


def test_spans_of_the_turn_before(clock):
    watch = Stopwatch(torch.device("cpu"))
    with watch("passes"):  # nobody asked yet
        clock.seconds += 50
    watch.on = True
    for seconds in (1.0, 2.0):
        with watch("passes"):
            clock.seconds += seconds
            with watch("ring"):
                clock.seconds += 0.25
        clock.seconds += 100
    with watch.off(), watch("passes"):
        clock.seconds += 7
    assert watch.turn() == {}
    with watch("passes"):
        clock.seconds += 9
    assert watch.turn() == {"passes": 3.5, "ring": 0.5}
    assert watch.turn() == {"passes": 9.0}
    assert watch.turn() == {}


@pytest.mark.parametrize(
    ("work", "slowest", "ratio"),
    [([1, 1, 1, 1], 0, 1), ([1, 2, 3, 9], 3, 4.5), ([4, 1], 0, 4), ([0, 0], 0, 0), ([1, 1, 5], 2, 5), ([2], 0, 1)],
)
def test_the_slowest_beside_the_median(work, slowest, ratio):
    found = summary(work)
    assert found["slowest_rank"] == slowest and found["slowest_work"] == work[slowest]
    assert found["slowest_over_median"] == ratio and all(math.isfinite(x) for x in found.values())


def hook_with(monkeypatch, clock, others: list[float]):
    """A hook of rank 0 over windows of two steps, whose own work is a second a step, among ranks with other ones."""
    told = []
    monkeypatch.setattr(stragglers, "from_all", lambda mine: told.append(mine) or [mine, *((x, 0.0) for x in others)])
    watch = Stopwatch(torch.device("cpu"))
    hook = StragglersHook(watch, 2)

    def step(number: int) -> dict:
        with watch("passes"):
            clock.seconds += 1.0
            with watch("ring"):
                clock.seconds += 0.5
        with watch("meeting"):
            clock.seconds += 0.25
        line = {"data_wait": 0.125 * number}
        hook.after_step(SimpleNamespace(step=number, engine=SimpleNamespace(is_main=True)), line)
        del line["data_wait"]
        return line

    return step, told


def test_a_line_every_few_steps_of_the_steps_before(monkeypatch, clock):
    step, told = hook_with(monkeypatch, clock, [3.0, 1.0])
    assert [step(n) for n in (1, 2, 3)] == [{}, {}, {}]
    assert step(4) == {
        "slowest_rank": 1, "slowest_work": 3.0, "slowest_over_median": 3.0, "most_data_wait": 0.1875, "comm_wait": 0.75
    }  # fmt: skip
    assert told == [(0.0, 0.0), (1.0, 0.1875)]  # of steps 1 and 2


def test_who_is_far_behind_for_long_is_told_now_and_then(monkeypatch, clock, caplog):
    step, _ = hook_with(monkeypatch, clock, [1.6, 1.0])
    for n in range(1, 2 * MANY + 2):
        step(n)
        assert not caplog.records, n
    step(2 * MANY + 2)
    assert "rank 1 has worked 1.6 times as long as the median rank for 20 steps" in caplog.text
    step, _ = hook_with(monkeypatch, clock, [1.5, 1.0])
    caplog.clear()
    for n in range(1, 6 * MANY):
        step(n)
    assert not caplog.records


def test_another_rank_is_counted_from_the_start(monkeypatch, clock, caplog):
    others = [1.6, 1.0]
    step, _ = hook_with(monkeypatch, clock, others)
    for n in range(1, 2 * MANY):
        step(n)
    others.reverse()
    for n in range(2 * MANY, 4 * MANY - 2):
        step(n)
        assert not caplog.records, n
    step(4 * MANY - 2)
    assert "rank 2 has worked" in caplog.text


def test_what_a_report_says():
    line = {"slowest_rank": 2, "slowest_over_median": 1.51}
    lines = [{"loss": 1.0}, *[line] * MANY, *[line | {"slowest_over_median": 1.5}] * 3]
    assert slow_rank(lines) == f"rank 2: over 1.5 times the median rank's work in {MANY} of {MANY + 3} windows"
    assert slow_rank(lines[:MANY]) is None and slow_rank([]) is None
    assert slow_rank([*lines, line | {"slowest_rank": 1}]).startswith("rank 2")
