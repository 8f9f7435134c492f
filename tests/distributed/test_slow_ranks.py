"""A rank that works longer is found, and what the others wait for it is not taken for their work: by a clock that every rank keeps
for itself, on which a pass takes as long as a test says and a meeting ends when the last one has come."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from titans_pretrain.commands import train as command
from titans_pretrain.config import load_config
from titans_pretrain.parallel.engine import ParallelEngine
from titans_pretrain.parallel.mesh import leave_mesh
from titans_pretrain.training.loggers import read_metrics

TINY = Path(__file__).parents[2] / "configs/tiny.yaml"
LONG, SHORT, WINDOW = 5.0, 2.0, 2


def run_train(settings: dict, slow: int) -> int:
    """`train` with a clock that moves in forward passes alone, by LONG on the slow rank and SHORT elsewhere, and in the sums of all
    processes, which end for all at once."""
    now = [0.0]
    call, total = ParallelEngine._call, dist.all_reduce

    def calling(engine, batch):
        now[0] += LONG if int(os.environ["RANK"]) == slow else SHORT
        return call(engine, batch)

    def summing(tensor, *args, **options):
        clocks = [None] * dist.get_world_size()
        dist.all_gather_object(clocks, now[0])
        now[0] = max(clocks)
        return total(tensor, *args, **options)

    with (
        patch.object(ParallelEngine, "_call", calling),
        patch.object(dist, "all_reduce", summing),
        patch("time.perf_counter", lambda: now[0]),
        patch.object(command, "leave_processes", leave_mesh),  # the ranks stay up
        patch.object(command, "plot_loss", lambda run_dir, entropy: None),
        patch("titans_pretrain.training.gauge._measure", lambda dtype: 1e12),
    ):
        return command.train(load_config(TINY, [f"{k}={v}" for k, v in settings.items()]))


@pytest.mark.parametrize("slow", [0, 1])
def test_the_slow_rank_is_named_and_the_others_wait_is_no_work(ranks, data, tmp_path, slow):
    settings = {
        "data.path": data, "run.dir": tmp_path, "data.seq_len": 64, "model.dim": 16, "model.window": 24, "train.steps": 3 * WINDOW,
        "model.memory.chunk_size": 8, "train.micro_batch": 1, "train.global_batch": 4, "train.log_every": WINDOW,
        "train.eval_every": WINDOW, "train.eval_batches": 1,
    }  # fmt: skip
    assert ranks(2).run(run_train, settings, slow) == [0, 0]
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "slowest_rank" in line]
    assert [line["step"] for line in lines] == [2 * WINDOW, 3 * WINDOW]
    for line in lines:  # two micro-batches a step; nothing of the validation
        assert line["slowest_rank"] == slow and line["slowest_work"] == 2 * LONG
        assert line["slowest_over_median"] == pytest.approx(LONG / SHORT)
        assert line["comm_wait"] == (0.0 if slow == 0 else 2 * (LONG - SHORT))
