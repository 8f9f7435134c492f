"""DNA from FASTA to a measured classifier: tokenize, pretrain, `titans-pretrain classify`."""

import json
import os
import random
import shutil
import signal

import pytest
import torch

from titans_pretrain import cli
from titans_pretrain.checkpoint import find_checkpoint, read_tensors
from titans_pretrain.config.load import load_as
from titans_pretrain.data_prep import cli as data_cli
from titans_pretrain.genomics.config import ClassifyConfig
from titans_pretrain.genomics.run import build_classifier, classify, table, with_model
from titans_pretrain.training.fit import load_weights

SMALL = ["model.dim=16", "model.layers=1", "model.heads=2", "model.memory.heads=2", "model.persistent_tokens=2"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run on a genome of a few sequences, by the recipe of docs/genomics.md."""
    folder, draw = tmp_path_factory.mktemp("genome"), random.Random(0)
    records = [
        f">chr{i} test\n" + "\n".join("".join(draw.choices("ACGTacgtN", k=60)) for _ in range(20)) for i in range(9)
    ]
    (folder / "genome.fa").write_text("\n".join(records) + "\n")
    arguments = ["tokenize", str(folder / "genome.fa"), "--tokenizer", "nucleotide", "--out", str(folder / "data")]
    with pytest.raises(SystemExit) as e:
        data_cli.main([*arguments, "--validation", "0.3", "--workers", "1"])
    assert not e.value.code
    train = [
        "data.seq_len=128",
        "train.steps=2",
        "train.warmup_steps=1",
        "train.micro_batch=2",
        "train.global_batch=2",
        "train.eval_every=2",
    ]
    assert (
        cli.main(
            [
                "train",
                "genomics/pretrain",
                f"data.path={folder}/data",
                *SMALL,
                *train,
                "train.eval_batches=2",
                f"run.dir={folder}/run",
            ]
        )
        == 0
    )
    return folder / "run"


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """Sequences with many A and T, or with many C and G, of different lengths."""
    root, draw = tmp_path_factory.mktemp("data") / "human_nontata_promoters", random.Random(0)
    for split, count in (("train", 60), ("test", 20)):
        for name, bases in (("negative", "AATTCG"), ("positive", "ATCCGG")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.txt").write_text("".join(draw.choices(bases, k=draw.randint(20, 50))))
    return root


@pytest.fixture
def settings(benchmark, tmp_path):
    return [
        f"data.path={benchmark}", "data.validation=0.2", "train.steps=30", "train.batch=16", "train.lr=1e-2", "train.warmup_steps=5",
        "train.eval_every=10", f"run.dir={tmp_path}/run",
    ]  # fmt: skip


def test_a_pretrained_model_is_fine_tuned_and_measured(pretrained, settings, tmp_path, capsys):
    command = ["classify", "genomics/classify", *settings, f"head.init_from={pretrained}"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "run/metrics.json").read_text())
    assert results["test_accuracy"] > 0.75 and results["kmers"]["accuracy"] > 0.75 and results["majority"] == 0.5
    assert results["start"] == "pretrained" and results["test_sequences"] == 40
    assert (tmp_path / "run/table.md").read_text().strip() in out
    assert "| lmm, pretrained |" in out and "| paper: HyenaDNA | 96.6 |" in out
    config = load_as(ClassifyConfig, tmp_path / "run/config.yaml")
    assert config.model.dim == 16 and config.model.vocab_size == 8
    model = build_classifier(with_model(config), 2)
    load_weights(model, tmp_path / "run/best.safetensors")
    assert cli.main(command) == 2 and "holds a run already" in capsys.readouterr().err


def test_pretrained_weights_are_those_of_the_run(pretrained, settings):
    config = with_model(load_as(ClassifyConfig, "genomics/classify", [*settings, f"head.init_from={pretrained}"]))
    model = build_classifier(config, 2)
    weights = model.backbone.state_dict()
    there = read_tensors(find_checkpoint(pretrained))
    assert weights and all(torch.equal(x, there[f"model.{name}"]) for name, x in weights.items())


def test_the_head_alone_over_a_frozen_model(pretrained, settings, tmp_path):
    overrides = [*settings, f"head.init_from={pretrained}", "head.trained=head", "head.pooling=last", "train.steps=3"]
    config = load_as(ClassifyConfig, "genomics/classify", overrides)
    assert classify(config, lambda line: None) == 0
    start, after = build_classifier(with_model(config), 2), build_classifier(with_model(config), 2)
    load_weights(after, tmp_path / "run/best.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(start.backbone.parameters(), after.backbone.parameters()))
    assert not torch.equal(start.head.weight, after.head.weight)
    results = json.loads((tmp_path / "run/metrics.json").read_text())
    assert "| lmm, pretrained, head alone trained |" in table(results) and results["trained_parameters"] == 34


def test_from_scratch_with_a_stop(settings, tmp_path, capsys):
    overrides = [*settings, *SMALL, "model.variant=mag", "train.steps=100000", "train.eval_every=2"]
    config = load_as(ClassifyConfig, "genomics/scratch", overrides)

    def say(line: str) -> None:
        if "(best)" in line:
            os.kill(os.getpid(), signal.SIGINT)

    assert classify(config, say) == 130
    assert "stopped by SIGINT: the best weights, of step 2," in capsys.readouterr().err
    assert (tmp_path / "run/best.safetensors").is_file() and not (tmp_path / "run/metrics.json").exists()


def test_errors_are_one_line(pretrained, settings, tmp_path, capsys, data):
    def told(*arguments: str) -> str:
        assert cli.main(["classify", "genomics/classify", *arguments]) == 2
        return capsys.readouterr().err

    assert "data.path is not set" in told()
    assert "no run or checkpoint folder gone" in told(*settings, "head.init_from=gone")
    assert "the model is that of head.init_from" in told(*settings, f"head.init_from={pretrained}", "model.layers=7")
    assert "the nucleotide tokenizer has 8 ids" in told(*settings, "model.vocab_size=7")
    assert "did you mean head.pooling?" in told(*settings, "head.poling=last")
    other = tmp_path / "bytes"
    shutil.copytree(pretrained, other)
    shutil.rmtree(other / "tokenizer")
    shutil.copytree(data / "tokenizer", other / "tokenizer")
    assert "was trained on tokens of byte of 259 ids" in told(*settings, f"head.init_from={other}")
    assert not (tmp_path / "run").exists()
