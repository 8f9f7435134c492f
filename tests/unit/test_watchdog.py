"""Who is said to be behind, of places that are written down."""

import math
from types import SimpleNamespace

import pytest

from titans_pretrain.parallel.watchdog import Watchdog, describe_hang

WAITING = [
    ["/x/titans_pretrain/training/trainer.py", 10, "run"],
    ["/x/titans_pretrain/parallel/engine.py", 130, "_agree"],
    ["/y/torch/distributed/c10d_logger.py", 80, "wrapper"],
    ["/y/torch/distributed/distributed_c10d.py", 3000, "all_reduce"],
]
READING = [["/x/titans_pretrain/data/shards.py", 40, "read"], ["/y/fsspec/http.py", 7, "get"], ["/y/ssl.py", 9, "recv"]]


@pytest.mark.parametrize(
    ("places", "told"),
    [
        (
            {0: (7, WAITING), 1: (7, READING), 2: (7, WAITING)},
            "rank 1 is behind, at step 8 in read (data/shards.py, line 40, calling get); the others wait in _agree "
            "(parallel/engine.py, line 130, calling wrapper)",
        ),
        (
            {0: (7, WAITING), 1: (6, WAITING)},
            "rank 1 is behind, at step 7 in _agree (parallel/engine.py, line 130, calling wrapper); rank 0 waits in _agree "
            "(parallel/engine.py, line 130, calling wrapper)",
        ),
        ({0: (7, WAITING), 1: (7, WAITING)}, "all wait at step 8, rank 0 in _agree (parallel/engine.py, line 130, calling wrapper)"),
        ({0: (7, WAITING), 1: None, 2: (7, READING), 3: None}, "rank 1, rank 3 did not answer"),
        ({0: (3, READING)}, "rank 0 is behind, at step 4 in read (data/shards.py, line 40, calling get)"),
    ],
)  # fmt: skip
def test_who_is_behind(places, told):
    assert describe_hang({r: p and {"step": p[0], "calls": p[1]} for r, p in places.items()}) == told


def test_a_run_that_is_through_does_not_hang():
    """It may upload for longer than a step may take."""
    watchdog, trainer = Watchdog(5.0, 60.0), SimpleNamespace(step=1)
    assert watchdog._moved == math.inf
    watchdog.around_step(trainer)
    watchdog.after_step(trainer, {})
    assert watchdog._moved < math.inf
    watchdog.after_run(trainer)
    assert watchdog._moved == math.inf
