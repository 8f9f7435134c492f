"""`train` on two processes writes the numbers that it writes on one, line by line: through warm-up, validation, a stop by a real
signal to one of the two, and the resume.

float64; with DeepSpeed, which has none, float32 and CALM."""

import math
import os
import shutil
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from parity import CALM, FLOAT32, FLOAT64
from processes import CLOCKS, STRAGGLERS

from titans_pretrain.commands import train as command
from titans_pretrain.config import load_config
from titans_pretrain.hf.export import export_checkpoint
from titans_pretrain.parallel.mesh import leave_mesh
from titans_pretrain.training.loggers import read_metrics
from titans_pretrain.training.trainer import Trainer

TINY = Path(__file__).parents[2] / "configs/tiny.yaml"
SETTINGS = {
    "data.seq_len": 64,
    "model.dim": 16,
    "model.window": 24,
    "model.persistent_tokens": 2,
    "model.memory.chunk_size": 8,
    "train.steps": 6,
    "train.warmup_steps": 3,
    "train.lr": 1e-2,
    "train.min_lr": 1e-3,
    "train.micro_batch": 1,
    "train.global_batch": 4,
    "train.eval_every": 2,
    "train.eval_batches": 1000,  # all there are: how many ranks read them does not matter
    "train.checkpoint_every": 0,
    "train.health_every": 5,
}
RATES = [1e-2 / 3, 2e-2 / 3, 1e-2, *(1e-3 + 9e-3 * (1 + math.cos(math.pi * part / 3)) / 2 for part in (1, 2, 3))]
CUT = 3  # the step after which a process gets its signal


def run_train(settings: dict, dtype: torch.dtype, stopped: int | None = None) -> int:
    """`train` in this process, one of many or alone; its exit code. stopped: the rank that gets a signal after step CUT."""
    step = Trainer.train_step

    def stepping(trainer: Trainer) -> dict:
        values = step(trainer)
        if trainer.step == CUT and int(os.environ.get("RANK", "0")) == stopped:
            os.kill(os.getpid(), signal.SIGUSR1)
        return values

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with (
            patch.object(Trainer, "train_step", stepping),
            patch.object(command, "leave_processes", leave_mesh),  # the ranks stay up
            patch.object(command, "plot_loss", lambda run_dir, entropy: None),
            patch.object(command, "memory_warning", lambda *args: None),  # float32 alone
        ):
            return command.train(load_config(TINY, [f"{k}={v}" for k, v in settings.items()]))
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """alone(dtype) -> the metrics of one process that nothing stops."""
    found = {}

    def get(dtype: torch.dtype) -> list[dict]:
        if dtype not in found:
            folder = tmp_path_factory.mktemp("alone")
            assert run_train(settings_of(data, folder, dtype), dtype) == 0
            found[dtype] = read_metrics(folder / "metrics.jsonl")
        return found[dtype]

    return get


def settings_of(data: Path, run_dir: Path, dtype: torch.dtype, **parallel) -> dict:
    calm = CALM if dtype == torch.float32 else {}
    return {
        **SETTINGS,
        **{k.replace("__", "."): v for k, v in calm.items()},
        **{f"parallel.{k}": v for k, v in parallel.items()},
        "data.path": data,
        "run.dir": run_dir,
    }


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"cp": 2, "segments_per_rank": 2},
        {"zero_stage": 1},
        pytest.param({"zero_stage": 1, "cp": 2}, marks=pytest.mark.slow),
    ],
    ids=["dp2", "cp2", "dp2-zero1", "cp2-zero1"],
)
def test_two_processes_log_what_one_does(ranks, data, alone, tmp_path, parallel):
    dtype, limit = (torch.float32, FLOAT32) if "zero_stage" in parallel else (torch.float64, FLOAT64)
    settings = settings_of(data, tmp_path, dtype, **parallel)
    if "cp" not in parallel:  # and checkpoints in every step, written while the next one runs
        settings |= {"train.checkpoint_async": True, "train.checkpoint_every": 1}
    two = ranks(2)
    assert two.run(run_train, settings, dtype, stopped=1) == [85, 85]
    assert max(line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")) == CUT
    assert (tmp_path / "checkpoints/latest").read_text() == f"step-{CUT:08d}\n"
    assert two.run(run_train, settings, dtype) == [0, 0]

    ours, expected = read_metrics(tmp_path / "metrics.jsonl"), alone(dtype)
    assert [line["lr"] for line in ours if "lr" in line] == pytest.approx(RATES, rel=1e-12)
    assert [line.keys() - {"checkpoint_stall"} - STRAGGLERS for line in ours] == [line.keys() for line in expected]
    assert {line["step"] for line in ours if "memory.1.drift" in line} == {5}
    for line, reference in zip(ours, expected, strict=True):
        for key in line.keys() - CLOCKS:
            if key.startswith("memory."):  # a mean over calls, of which a sequence in segments has more
                continue
            assert line[key] == pytest.approx(reference[key], rel=limit), (key, line, reference)


@pytest.mark.slow
def test_two_processes_start_from_an_export_as_one_does(ranks, data, tmp_path):
    """The first one imports it, alone; where that fails, all say why."""
    settings = settings_of(data, tmp_path / "first", torch.float32) | {"train.steps": 1, "train.eval_every": 0}
    assert run_train(settings, torch.float32) == 0
    export_checkpoint(tmp_path / "first", tmp_path / "export")
    settings["train.init_from"] = tmp_path / "export"
    assert run_train(settings | {"run.dir": tmp_path / "one"}, torch.float32) == 0
    two = ranks(2)
    assert two.run(run_train, settings | {"run.dir": tmp_path / "two"}, torch.float32) == [0, 0]
    one, both = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("one", "two"))
    fresh = read_metrics(tmp_path / "first/metrics.jsonl")[0]
    assert both["loss"] == pytest.approx(one["loss"], rel=FLOAT32) and one["loss"] < fresh["loss"]
    next((tmp_path / "export").glob("*.safetensors")).unlink()
    with pytest.raises(Exception, match="train.init_from=.*safetensors is not there"):
        two.run(run_train, settings | {"run.dir": tmp_path / "three"}, torch.float32)


def refusal(settings: dict) -> str:
    """What `train` says of settings that it refuses, on this process."""
    try:
        run_train(settings, torch.float64)
    except ValueError as e:
        return str(e)
    finally:
        leave_mesh()
    return ""


def test_two_processes_go_on_from_a_store_when_their_folder_is_lost(ranks, data, alone, tmp_path):
    two, store = ranks(2), tmp_path / "store"
    first, second, third = (
        settings_of(data, tmp_path / name, torch.float64) | {"train.checkpoint_store": store}
        for name in ("first", "second", "third")
    )
    assert two.run(run_train, first, torch.float64, stopped=1) == [85, 85]
    shutil.rmtree(tmp_path / "first")
    assert two.run(run_train, second, torch.float64) == [0, 0]
    ours, expected = read_metrics(tmp_path / "second/metrics.jsonl"), alone(torch.float64)
    assert [(line["step"], "loss" in line) for line in ours] == [(line["step"], "loss" in line) for line in expected]
    for line, reference in zip(ours, expected, strict=True):
        for key in {"loss", "grad_norm", "validation_loss"} & line.keys():
            assert line[key] == pytest.approx(reference[key], rel=FLOAT64)
    for path in store.glob("checkpoints/*/trainer.json"):
        path.write_text("{}")
    told = two.run(refusal, third)
    assert told[0] == told[1] and f"no checkpoint in {store} is whole" in told[0]
