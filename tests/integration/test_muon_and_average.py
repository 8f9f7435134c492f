"""Runs with Muon and an average of the weights, from the command line: resumed, exported, refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from titans_pretrain import cli
from titans_pretrain.checkpoint import read_tensors
from titans_pretrain.training.loggers import read_metrics
from titans_pretrain.training.norms import GROUPS, KINDS

TINY = Path(__file__).parents[2] / "configs/tiny.yaml"
SMALL = [
    "model.dim=32", "data.seq_len=64", "train.micro_batch=1", "train.global_batch=2", "train.eval_batches=2", "train.eval_every=2",
    "train.checkpoint_every=2", "train.health_every=2",
]  # fmt: skip
OURS = ["train.optimizer=muon", "train.ema=0.8"]


@pytest.fixture
def train(data, tmp_path):
    def train(name: str, *overrides: str) -> int:
        return cli.main(["train", str(TINY), *SMALL, f"data.path={data}", f"run.dir={tmp_path}/{name}", *overrides])

    return train


def test_a_resumed_run_is_the_same_run_and_its_average_is_exported(train, tmp_path, capsys):
    assert train("straight", *OURS, "train.steps=4") == 0
    assert train("resumed", *OURS, "train.steps=4", f"train.resume={tmp_path}/straight/checkpoints/step-00000002") == 0
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "resumed")]
    tensors = [read_tensors(tmp_path / name / "checkpoints/step-00000004") for name in ("straight", "resumed")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensor) for name, tensor in tensors[1].items())
    assert {name.split(".")[0] for name in tensors[0]} == {"model", "momentum_buffer", "exp_avg", "exp_avg_sq", "ema"}
    kept = [
        {
            line["step"]: {k: v for k, v in line.items() if k.startswith(("loss", "validation_loss", *KINDS))}
            for line in each
        }
        for each in lines
    ]
    assert all(kept[1][step] == kept[0][step] for step in (3, 4))
    last = [line for line in lines[0] if line["step"] == 4]
    groups = {f"{kind}.{group}" for kind in KINDS for group in GROUPS}
    assert groups <= last[0].keys() and not any("." in name for line in lines[0] if line["step"] == 3 for name in line)
    assert sum(v**2 for k, v in last[0].items() if k.startswith("grad_norm.")) ** 0.5 == pytest.approx(
        last[0]["grad_norm"], rel=1e-5
    )
    assert last[1]["validation_loss_ema"] != last[1]["validation_loss"]

    for name, options in (("weights", []), ("average", ["--ema"])):
        assert cli.main(["export", str(tmp_path / "straight"), str(tmp_path / name), *options]) == 0
    for name, kind in (("weights", "model"), ("average", "ema")):
        exported = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(exported["model.norm.weight"], tensors[0][f"{kind}.norm.weight"])
        found = exported["model.layers.0.mlp.up_proj.weight"]
        assert torch.equal(found, tensors[0][f"{kind}.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(tensors[0]["model.norm.weight"], tensors[0]["ema.norm.weight"])


def test_what_is_not_there_is_told_in_a_line(train, tmp_path, capsys):
    assert train("run", "train.steps=2") == 0
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--ema"]) == 2
    told = capsys.readouterr().err
    assert "step-00000002 has no average of the weights: its run was trained with train.ema=0" in told
    assert not (tmp_path / "out").exists()
    assert train("run", "train.steps=4", "train.optimizer=muon") == 2
    told = capsys.readouterr().err
    assert (
        "has the moments of train.optimizer=adamw, not of muon: keep adamw, or give a new run.dir and train.init_from"
        in told
    )
    assert train("second", "train.steps=1", *OURS, f"train.init_from={tmp_path}/run") == 0
