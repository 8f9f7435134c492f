"""Which rank the others wait for: every rank's own work, compared now and then.

work        seconds of a step in forward and backward passes, without what the context-parallel ring waited for, and in the optimizer's
            update (not ZeRO's). Ranks that share a copy of the model by tensor or pipeline parallelism wait for each other inside
            their passes and come out alike: then the first rank of the slowest copy is named.
data_wait   seconds of a step in which the host waited for its rows
comm_wait   seconds of a step in which this process waited where ranks meet between passes (sums of gradients and of the loss,
            agreements) and on the ring; not inside the passes of tensor and pipeline parallelism, nor in DeepSpeed's own step

On a GPU work and comm_wait are times of the device (stopwatch.py).
"""

import logging
from collections.abc import Sequence
from statistics import median_low

from titans_pretrain.checkpoint.together import agreeing_over, from_all
from titans_pretrain.training.hooks import Hook
from titans_pretrain.training.stopwatch import Stopwatch

log = logging.getLogger(__name__)
SLOW = 1.5  # times the median
MANY = 10  # windows in a row
PASSES, RING, MEETING = "passes", "ring", "meeting"  # spans of an engine's stopwatch


class StragglersHook(Hook):
    """Every `every` steps: the slowest rank of the `every` steps before the latest ones, in the step's line, and a warning where it has
    been the same one, far behind, for long. hosts: the processes' group for what hosts tell each other; None: the default one.

    Not for ZeRO stages that sum gradients inside the backward pass: there all ranks take equally long."""

    def __init__(self, stopwatch: Stopwatch, every: int, hosts=None):
        self._stopwatch, self._every, self._hosts = stopwatch, every, hosts
        stopwatch.on = True
        self._data, self._data_before = 0.0, 0.0
        self._last, self._times = -1, 0  # the rank that was far behind, and for how many windows

    def after_step(self, trainer, line: dict) -> None:
        self._data += line["data_wait"]
        if trainer.step % self._every:
            return
        spans = self._stopwatch.turn()
        data, self._data_before, self._data = self._data_before, self._data, 0.0
        work = spans.get(PASSES, 0.0) - spans.get(RING, 0.0)
        with agreeing_over(self._hosts):
            told = from_all((work / self._every, data / self._every))
        if not spans:
            return  # the first window of a process is not over
        found = summary([work for work, _ in told])
        line |= found
        line["most_data_wait"] = round(max(data for _, data in told), 4)
        line["comm_wait"] = round((spans.get(MEETING, 0.0) + spans.get(RING, 0.0)) / self._every, 4)
        self._watch(found, trainer)

    def _watch(self, found: dict, trainer) -> None:
        behind = found["slowest_rank"] if found["slowest_over_median"] > SLOW else -1
        self._times = self._times + 1 if behind == self._last else 1
        self._last = behind
        if behind >= 0 and self._times % MANY == 0 and trainer.engine.is_main:
            log.warning(
                "step %d: rank %d has worked %.1f times as long as the median rank for %d steps; the others wait for it",
                trainer.step, behind, found["slowest_over_median"], self._times * self._every,
            )  # fmt: skip


def summary(work: Sequence[float]) -> dict[str, float]:
    """work: seconds of each rank. The lower median: of two ranks, the faster one is what the other is compared with."""
    slowest = max(range(len(work)), key=work.__getitem__)
    return {
        "slowest_rank": slowest,
        "slowest_work": round(work[slowest], 4),
        "slowest_over_median": round(work[slowest] / max(median_low(work), 1e-9), 3),
    }


def slow_rank(lines: Sequence[dict]) -> str | None:
    """For a report: the rank that was far behind most often, if any was in MANY windows or more. lines: of metrics.jsonl."""
    windows = [line for line in lines if "slowest_over_median" in line]
    behind = [line["slowest_rank"] for line in windows if line["slowest_over_median"] > SLOW]
    if not behind:
        return None
    rank = max(set(behind), key=behind.count)
    if behind.count(rank) < MANY:
        return None
    return f"rank {rank:.0f}: over {SLOW} times the median rank's work in {behind.count(rank):,} of {len(windows):,} windows"
