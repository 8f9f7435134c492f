"""A run whose batch and rows grow and whose mixture changes writes on two processes the numbers that it writes on one, through every
change and a resume in the middle of it."""

import pytest
import torch
from parity import FLOAT32, FLOAT64
from processes import STRAGGLERS
from test_train_on_two import CUT, SETTINGS, run_train, settings_of

from titans_pretrain.data_prep import cli as data_cli
from titans_pretrain.training.loggers import read_metrics

STEPS = SETTINGS["train.steps"]
# Every value holds for a step before the stop after step CUT, or after it; the tokens are those of 64 a row.
WARM = {
    "train.global_batch": 8,
    "train.batch_warmup": "[[0,2],[2,4],[4,8]]",
    "data.seq_len_warmup": "[[0,32],[3,64]]",
    "train.eval_batches": 4,  # fewer than a step has on one process
}
ROWS, LENGTHS = [2, 2, 4, 4, 8, 8], [32, 32, 32, 64, 64, 64]


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """A second corpus."""
    folder = tmp_path_factory.mktemp("more")
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(" ".join(f"{i * j % 23}" for j in range(60)))
    with pytest.raises(SystemExit) as e:
        data_cli.main(
            ["tokenize", str(folder), "--suffix", ".txt", "--tokenizer", "byte", "--out", str(folder / "data"),
             "--validation", "0.05", "--workers", "1"]
        )  # fmt: skip
    assert not e.value.code
    return folder / "data"


def warm(data, more, run_dir, dtype, **parallel) -> dict:
    mixture = {"data.mixture": f'{{"{data}": 1}}', "data.mixture_schedule": f'[[400,{{"{data}": 1, "{more}": 2}}]]'}
    settings = settings_of(data, run_dir, dtype, **parallel) | WARM | mixture
    del settings["data.path"]
    return settings


@pytest.fixture(scope="module")
def alone(data, more, tmp_path_factory):
    """alone(dtype) -> the metrics of one process that nothing stops."""
    found = {}

    def get(dtype: torch.dtype) -> list[dict]:
        if dtype not in found:
            folder = tmp_path_factory.mktemp("alone")
            assert run_train(warm(data, more, folder, dtype), dtype) == 0
            found[dtype] = read_metrics(folder / "metrics.jsonl")
        return found[dtype]

    return get


def agree(line: dict, reference: dict, limit: float) -> None:
    assert line.keys() - STRAGGLERS - {"checkpoint_stall"} == reference.keys() - {"checkpoint_stall"}
    for key in line.keys() & {"step", "tokens", "loss", "grad_norm", "lr", "validation_loss", "validation_tokens"}:
        assert line[key] == pytest.approx(reference[key], rel=limit), (key, line, reference)


LAYOUTS = {
    "dp2": {},
    "cp2-k2": {"cp": 2, "segments_per_rank": 2},
    "pp2": {"pp": 2},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero2-offload": {"zero_stage": 2, "offload_optimizer": True},
    "zero3": {"zero_stage": 3},
    "zero3-offload": {"zero_stage": 3, "offload_optimizer": True},
    "cp2-zero2-inflight": {"cp": 2, "zero_stage": 2, "inflight": 2},
}
QUICK = ("dp2",)


@pytest.mark.parametrize(
    "parallel",
    [pytest.param(x, id=name, marks=[] if name in QUICK else [pytest.mark.slow]) for name, x in LAYOUTS.items()],
)
def test_two_processes_grow_as_one_does(ranks, data, more, alone, tmp_path, parallel):
    dtype, limit = (torch.float32, FLOAT32) if "zero_stage" in parallel else (torch.float64, FLOAT64)
    settings, two = warm(data, more, tmp_path, dtype, **parallel), ranks(2)
    assert two.run(run_train, settings, dtype, stopped=1) == [85, 85]
    assert (tmp_path / "checkpoints/latest").read_text() == f"step-{CUT:08d}\n"
    assert two.run(run_train, settings, dtype) == [0, 0]

    ours, expected = read_metrics(tmp_path / "metrics.jsonl"), alone(dtype)
    steps = [line for line in ours if "lr" in line]
    assert [(line["global_batch"], line["seq_len"]) for line in steps] == list(zip(ROWS, LENGTHS, strict=True))
    for line, reference in zip(ours, expected, strict=True):
        agree(line, reference, limit)


@pytest.mark.parametrize("processes", [(1, 2), pytest.param((2, 1), marks=pytest.mark.slow)], ids=["1-to-2", "2-to-1"])
def test_a_warm_up_goes_on_under_another_layout(ranks, data, more, alone, tmp_path, processes):
    settings = warm(data, more, tmp_path, torch.float64)
    for number, count in enumerate(processes):
        arguments = (settings, torch.float64) if number else (settings, torch.float64, 0)
        codes = ranks(2).run(run_train, *arguments) if count == 2 else [run_train(*arguments)]
        assert set(codes) == ({0} if number else {85})
    ours = read_metrics(tmp_path / "metrics.jsonl")
    for line, reference in zip(ours, alone(torch.float64), strict=True):
        agree(line, reference, FLOAT64)
