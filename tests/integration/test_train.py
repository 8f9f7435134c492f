"""`titans-pretrain train` end to end on a small corpus: interruptions, resuming, bad input."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from titans_pretrain import cli
from titans_pretrain.checkpoint import read_tensors
from titans_pretrain.models import TitansForCausalLM
from titans_pretrain.training.loggers import read_metrics

TINY = Path(__file__).parents[2] / "configs/tiny.yaml"
# smaller still, and with two micro-batches a step
SMALL = [
    "model.dim=32",
    "data.seq_len=64",
    "train.micro_batch=1",
    "train.global_batch=2",
    "train.eval_batches=2",
    "model.mac.segment=32",
]


@pytest.fixture
def train(data, tmp_path):
    """train("key=value", ...) -> exit code, in tmp_path/run unless told otherwise."""

    def train(*overrides: str) -> int:
        return cli.main(["train", str(TINY), *SMALL, f"data.path={data}", f"run.dir={tmp_path}/run", *overrides])

    return train


def start(data: Path, run_dir: Path, *overrides: str) -> subprocess.Popen:
    """The real command in a process of its own."""
    arguments = ["train", str(TINY), *SMALL, f"data.path={data}", f"run.dir={run_dir}", *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "titans_pretrain", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    while process.poll() is None:
        lines = read_metrics(run_dir / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"ended with {process.returncode} before step {step}: {process.communicate()[1]}")


def without_clocks(run_dir: Path) -> list[dict]:
    clocks = ("tokens_per_second", "mfu", "data_wait", "checkpoint_stall", "peak_memory_mib")
    return [{k: v for k, v in line.items() if k not in clocks} for line in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.slow
def test_killed_and_stopped_runs_end_with_the_same_bits(data, tmp_path):
    """20 steps = 10 steps, kill -9 after step 12 + steps up to a SIGTERM after step 14 + the rest."""
    settings = ["train.steps=20", "train.checkpoint_every=10", "train.eval_every=5"]
    straight = start(data, tmp_path / "straight", *settings)
    assert straight.wait() == 0, straight.communicate()[1]

    run = tmp_path / "run"
    killed = start(data, run, *settings)
    wait_for_step(killed, run, 12)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert (run / "checkpoints/latest").read_text() == "step-00000010\n"

    stopped = start(data, run, *settings)
    wait_for_step(stopped, run, 14)  # of this process: opening metrics.jsonl dropped the lines after step 10
    stopped.send_signal(signal.SIGTERM)
    out, err = stopped.communicate()
    assert stopped.returncode == 85, err
    assert "goes on from" in out
    assert "stopped by SIGTERM: saved" in err
    step = json.loads(
        (run / "checkpoints" / (run / "checkpoints/latest").read_text().strip() / "trainer.json").read_text()
    )["step"]
    assert 14 <= step < 20

    last = start(data, run, *settings)
    assert last.wait() == 0, last.communicate()[1]
    straight, resumed = (folder / "checkpoints/step-00000020" for folder in (tmp_path / "straight", run))
    assert_same_tensors(straight, resumed)
    assert (straight / "trainer.json").read_bytes() == (resumed / "trainer.json").read_bytes()
    assert without_clocks(run) == without_clocks(tmp_path / "straight")
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line] == list(range(1, 21))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "variant", [pytest.param("lmm", marks=SLOW), "mac", "mag", pytest.param("mal", marks=SLOW), "transformer"]
)
def test_every_variant_learns(train, tmp_path, variant):
    assert train(f"model.variant={variant}", "train.steps=12", "train.eval_every=12", "train.lr=1e-2") == 0
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert lines[-1]["validation_loss"] < lines[0]["loss"] - 1.0
    assert all(line["tokens"] > 0 and math.isfinite(line["grad_norm"]) for line in lines if "loss" in line)
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")


def test_recompute_and_accumulation_change_nothing(train, tmp_path, monkeypatch):
    recomputed = []

    def counting(layer, *args, **kwargs):
        recomputed.append(layer)
        return checkpoint(layer, *args, **kwargs)

    monkeypatch.setattr("titans_pretrain.models.causal_lm.checkpoint", counting)
    losses = {}
    for name, settings in {
        "plain": ["train.micro_batch=2"],
        "recompute": ["train.micro_batch=2", "train.recompute=block"],
        "accumulated": ["train.micro_batch=1"],
    }.items():
        assert train("train.steps=4", "train.eval_every=0", f"run.dir={tmp_path}/{name}", *settings) == 0
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
    assert len(recomputed) == 4 * 2  # steps x layers, of the second run alone
    assert losses["recompute"] == losses["plain"]
    assert losses["accumulated"] == pytest.approx(losses["plain"], rel=1e-5)


def test_bf16_computes_in_bf16_and_keeps_float32_parameters(train, tmp_path, monkeypatch):
    seen = set()
    forward = TitansForCausalLM.forward

    def watching(self, *args, **kwargs):
        hook = self.layers[0].mlp.up_proj.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
        out = forward(self, *args, **kwargs)
        seen.update(w.dtype for w in out.state.layers[0].memory.memory.weights)
        hook.remove()
        return out

    monkeypatch.setattr(TitansForCausalLM, "forward", watching)
    assert train("train.steps=3", "train.precision=bf16", "train.eval_every=3") == 0
    assert seen == {torch.bfloat16, torch.float32}  # matrix products, memory weights
    saved = read_tensors(tmp_path / "run/checkpoints/step-00000003")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert read_metrics(tmp_path / "run/metrics.jsonl")[2]["loss"] < math.log(512)


def assert_same_tensors(a: Path, b: Path) -> None:
    ours, theirs = read_tensors(a), read_tensors(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def error_of(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert lines[-1] == errors[0]  # nothing after it, no traceback
    return errors[0]


def test_nan_ends_with_one_line_and_the_checkpoint_stays(train, tmp_path, monkeypatch, capsys):
    assert train("train.steps=2") == 0
    before = files_of(tmp_path / "run/checkpoints/step-00000002")
    forward = TitansForCausalLM.forward

    def poisoned(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if self.training:
            out.loss = out.loss * float("nan")
        return out

    monkeypatch.setattr(TitansForCausalLM, "forward", poisoned)
    capsys.readouterr()
    assert train("train.steps=6") == 2
    message = error_of(capsys)
    assert "step 3: the loss is nan" in message
    assert "step-00000002" in message
    assert "lower train.lr" in message
    assert files_of(tmp_path / "run/checkpoints/step-00000002") == before
    monkeypatch.setattr(TitansForCausalLM, "forward", forward)
    assert train("train.steps=6") == 0  # and it goes on from there
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"] == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=null"], "data.path is not set"),
        (["data.path=gone"], "gone/manifest.json: no such file"),
        (["data.path={tmp_path}"], "manifest.json: no such file; is data.path a folder that"),
        (["model.vocab_size=100"], "model.vocab_size=100 is too small for the data's tokenizer of 259 ids"),
        (["data.seq_len=0"], "data.seq_len must be 1 or more, got 0"),
        (["data.seq_len=100"], "data.seq_len=100 must be a multiple of model.memory.chunk_size=16"),
        (["model.variant=mac", "data.seq_len=80"], "data.seq_len=80 must be a multiple of model.mac.segment=32"),
        (["train.steps=many"], "train.steps = 'many': must be an integer"),
        (["version=4"], "version 4 is newer than version 3"),
        (["train.resume={tmp_path}/gone"], "no run or checkpoint folder {tmp_path}/gone"),
        (["train.resume={tmp_path}"], "holds no checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(train, tmp_path, capsys, overrides, message):
    assert train(*(text.format(tmp_path=tmp_path) for text in overrides)) == 2
    assert message.replace("{tmp_path}", str(tmp_path)) in error_of(capsys)
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_named(train, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert train("train.device=cuda") == 2
    assert "train.device=cuda, but torch sees no GPU here" in error_of(capsys)


def test_debugging_shows_the_traceback(train, monkeypatch):
    monkeypatch.setenv("TITANS_DEBUG", "1")
    with pytest.raises(ValueError, match="data.path is not set"):
        train("data.path=null")


def test_another_model_or_other_data_is_refused_on_resume(train, tmp_path, capsys):
    assert train("train.steps=2") == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert train("train.steps=4", "model.layers=3") == 2
    assert "was written by another model: model.layers is 2 there and 3 here" in error_of(capsys)
    assert train("train.steps=4", "model.rope_theta=5e5") == 2  # which a second stage may change
    assert "was written by another model: model.rope_theta is 10000.0 there and 500000.0 here" in error_of(capsys)
    assert train("train.steps=4", "train.seed=5") == 2
    assert "data cursor has seed=0, this run has seed=5" in error_of(capsys)
    assert train("train.steps=4", "train.resume=never") == 2
    assert "train.resume=never would train over it" in error_of(capsys)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert train("train.steps=3", "model.memory.backend=reference", "train.lr=1e-3") == 0
    assert "train.lr: 0.003 -> 0.001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variant", "key", "code"),
    [("mag", "mac.residual=false", 0), ("mac", "mac.residual=false", 2), ("transformer", "memory.damping=0", 0)],
)
def test_a_setting_that_no_layer_has_is_not_another_model(train, capsys, variant, key, code):
    """As runs of before there was the setting have its old meaning, whatever their variant."""
    assert train("train.steps=1", f"model.variant={variant}") == 0
    assert train("train.steps=2", f"model.variant={variant}", f"model.{key}") == code
    told = "model.mac.residual is True there and False here; give what is there, or choose another run.dir"
    assert (told in capsys.readouterr().err) == (code == 2)


def test_a_new_run_from_a_checkpoint_of_another(train, tmp_path):
    assert (
        train("train.steps=4", "train.checkpoint_every=2", "train.lr=1e-3", "train.min_lr=1e-3", "train.warmup_steps=0")
        == 0
    )
    settings = [
        "train.steps=4",
        "train.lr=1e-3",
        "train.min_lr=1e-3",
        "train.warmup_steps=0",
        f"run.dir={tmp_path}/other",
    ]
    assert train(*settings, f"train.resume={tmp_path}/run/checkpoints/step-00000002") == 0
    assert_same_tensors(*(tmp_path / run / "checkpoints/step-00000004" for run in ("run", "other")))
    assert [line["step"] for line in without_clocks(tmp_path / "other")] == [3, 4, 4]
    assert train(*settings, "train.resume=gone") == 0  # its own checkpoint comes first
    assert [line["step"] for line in without_clocks(tmp_path / "other")] == [3, 4, 4]


def loses():
    """A call that fails as on a full disk."""

    def call(*args, **options):
        raise OSError(122, "Disk quota exceeded")

    return call


def test_a_decay_branch_is_the_run_that_would_have_ended_there(train, tmp_path, capsys):
    """The recipe of docs/training.md: off a run without an end; that run is left as it is and goes on."""
    main, branch = tmp_path / "run", tmp_path / "run-decayed"
    assert train("train.schedule=constant", "train.steps=6", "train.checkpoint_every=2", "train.warmup_steps=2") == 0
    before = files_of(main)
    decays = ["train.schedule=wsd", "train.steps=7", "train.decay_steps=3"]
    off = [
        f"run.dir={branch}",
        f"train.resume={main}/checkpoints/step-00000004",
        "train.resume_data=true",
        "train.init_from=null",
    ]
    capsys.readouterr()
    assert cli.main(["train", f"{main}/config.yaml", *off, *decays]) == 0
    shown = capsys.readouterr().out
    assert "  train.schedule: constant -> wsd" in shown and "warning: the learning rate" not in shown
    assert files_of(main) == before

    straight = [f"run.dir={tmp_path}/straight", "train.warmup_steps=2", "train.checkpoint_every=2"]
    assert train(*decays, *straight) == 0
    ended = [folder / "checkpoints/step-00000007" for folder in (tmp_path / "straight", branch)]
    assert_same_tensors(*ended)
    assert len({(folder / "trainer.json").read_bytes() for folder in ended}) == 1
    assert without_clocks(branch) == [line for line in without_clocks(tmp_path / "straight") if line["step"] > 4]
    rates = [line["lr"] for line in read_metrics(branch / "metrics.jsonl") if "lr" in line]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(1e-5)
    assert train("train.schedule=constant", "train.steps=8", "train.warmup_steps=2") == 0
    assert {line["lr"] for line in read_metrics(main / "metrics.jsonl") if line["step"] > 2 and "lr" in line} == {3e-3}


@pytest.mark.slow
def test_warm_ups_are_resumed_with_the_same_bits_and_targets(train, tmp_path):
    """From a checkpoint before each change of the batch and of the row length; and what is trained on is what it is without cuts."""
    warm = [
        "train.global_batch=4",
        "train.batch_warmup=[[0,1],[2,2],[4,4]]",
        "train.checkpoint_every=1",
        "train.keep_checkpoints=0",
    ]
    cut = [*warm, "data.seq_len_warmup=[[0,16],[3,32],[5,64]]", "train.steps=6", "train.eval_every=3"]
    assert train(*cut) == 0
    lines = without_clocks(tmp_path / "run")
    assert {line["step"]: (line["global_batch"], line["seq_len"]) for line in lines if "lr" in line} == {
        1: (1, 16), 2: (1, 16), 3: (2, 16), 4: (2, 32), 5: (4, 32), 6: (4, 64)
    }  # fmt: skip
    for step in (1, 3, 5):
        run = tmp_path / f"from-{step}"
        assert train(*cut, f"run.dir={run}", f"train.resume={tmp_path}/run/checkpoints/step-{step:08}") == 0
        assert_same_tensors(tmp_path / "run/checkpoints/step-00000006", run / "checkpoints/step-00000006")
        assert without_clocks(run) == [line for line in lines if line["step"] > step]
    assert train(*warm, "train.steps=6", "train.eval_every=3", f"run.dir={tmp_path}/uncut") == 0
    uncut = without_clocks(tmp_path / "uncut")
    assert [line["tokens"] for line in uncut] == [line["tokens"] for line in lines]
    assert [line["validation_tokens"] for line in uncut if "validation_tokens" in line] == [
        line["validation_tokens"] for line in lines if "validation_tokens" in line
    ]
    ends = [
        json.loads((tmp_path / run / "checkpoints/step-00000006/trainer.json").read_text()) for run in ("run", "uncut")
    ]
    assert ends[0]["reader"] == ends[1]["reader"]


def test_a_decay_that_would_have_begun_before_its_branch_is_told(train, tmp_path, capsys):
    assert train("train.schedule=constant", "train.steps=6", "train.eval_every=0") == 0
    off = [f"run.dir={tmp_path}/branch", f"train.resume={tmp_path}/run", "train.schedule=wsd"]
    capsys.readouterr()
    assert train(*off, "train.steps=8", "train.decay_steps=4", "train.eval_every=0") == 0
    told = capsys.readouterr().out
    assert "falls from step 4 on, which is before this checkpoint" in told and "set train.steps=10" in told
    assert train(*off, "train.steps=9", "train.decay_steps=4", "train.eval_every=0") == 0  # goes on with its own
    assert "warning: the learning rate" not in capsys.readouterr().out


def test_at_the_end_nothing_but_the_checkpoint_decides_the_exit_code(train, tmp_path, monkeypatch, capsys):
    from titans_pretrain.commands import train as command
    from titans_pretrain.training.loggers import JsonlLogger
    from titans_pretrain.training.trainer import Trainer

    step = Trainer.train_step

    def stopped(self):
        values = step(self)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return values

    monkeypatch.setattr(command, "plot_loss", loses())
    monkeypatch.setattr(JsonlLogger, "close", loses())
    monkeypatch.setattr(JsonlLogger, "flush", loses())
    monkeypatch.setattr(Trainer, "train_step", stopped)
    assert train("train.steps=3", "train.eval_every=0") == 85
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000002\n"
    assert "stopped by SIGUSR1: saved" in capsys.readouterr().err
    assert train("train.steps=3", "train.eval_every=0") == 0
    assert capsys.readouterr().err.count("Disk quota exceeded; the training is not affected") == 2  # close, plot


def test_the_curve_at_the_end_has_the_unigram_entropy(train, data, monkeypatch):
    from titans_pretrain.commands import train as command
    from titans_pretrain.data import unigram_entropy

    drawn = []
    monkeypatch.setattr(command, "plot_loss", lambda run_dir, entropy: drawn.append(entropy))
    assert train("train.steps=1", "train.eval_every=0") == 0
    assert drawn == [unigram_entropy(data, "validation")]


def test_the_checkpoint_before_a_damaged_one_is_taken_with_one_line(train, tmp_path, capsys):
    settings = ["train.checkpoint_every=1", "train.eval_every=0", "train.min_lr=0.003"]
    assert train("train.steps=3", *settings) == 0
    checkpoints = tmp_path / "run/checkpoints"
    expected = read_tensors(checkpoints / "step-00000003")
    damage(checkpoints / "step-00000003/weights/__0_0.distcp")
    damage(checkpoints / "step-00000002/config.yaml")
    capsys.readouterr()
    assert train("train.steps=3", *settings) == 0
    told = capsys.readouterr()
    warnings = [line for line in told.err.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 2 and "step-00000003/weights/__0_0.distcp is damaged" in warnings[0]
    assert "step-00000002/config.yaml is damaged" in warnings[1]
    assert "goes on from" in told.out and "step-00000001 (step 1)" in told.out
    again = read_tensors(checkpoints / "step-00000003")  # replaced
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    assert [line["step"] for line in without_clocks(tmp_path / "run")] == [1, 2, 3]
    for path in checkpoints.glob("step-*/trainer.json"):
        damage(path)
    assert train("train.steps=4", *settings) == 2
    assert "no checkpoint up to" in error_of(capsys)
    assert cli.main(["verify", str(tmp_path / "run")]) == 2
    assert "3 of 3 checkpoints are damaged" in error_of(capsys)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_two_runs_in_one_folder(data, tmp_path):
    """The second is refused, in one line that names the first, and changes nothing."""
    run = tmp_path / "run"
    first = start(data, run, "train.steps=2000", "train.eval_every=0", "train.checkpoint_every=0")
    try:
        wait_for_step(first, run, 2)
        second = start(data, run, "train.steps=2000")
        _, err = second.communicate()
        assert second.returncode == 2
        assert f"error: process {first.pid} on {os.uname().nodename} trains in {run}" in err
        first.send_signal(signal.SIGTERM)
        _, err = first.communicate()
        assert first.returncode == 85, err
    finally:
        first.kill()
    lines = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert lines == list(range(1, len(lines) + 1))
    assert not (run / "lock").exists()


def test_a_longer_row_in_three_stages(train, tmp_path, capsys):
    """As configs/longcontext does it: each stage a run of its own that starts with the weights of the one before."""
    common = ["train.steps=2", "train.eval_every=0", "train.warmup_steps=0", "train.min_lr=0.003"]
    assert train(*common) == 0
    before = tmp_path / "run"
    for length in (128, 256):
        run = tmp_path / f"{length}"
        stage = [*common, f"run.dir={run}", f"data.seq_len={length}", f"train.init_from={before}"]
        assert train(*stage, "train.steps=1", "train.lr=0", "train.min_lr=0") == 0
        told = capsys.readouterr().out
        assert f"starts with the weights of {before}/checkpoints/step-00000002; optimizer, step and data from" in told
        assert f"  data.seq_len: {length // 2} -> {length}\n" in told and "  train.lr: 0.003 -> 0" in told
        first, old = (
            read_tensors(r / "checkpoints" / n) for r, n in ((run, "step-00000001"), (before, "step-00000002"))
        )
        for name, tensor in old.items():
            if name.startswith("model."):
                assert torch.equal(first[name], tensor), name  # a step of length 0
        trainer = json.loads((run / "checkpoints/step-00000001/trainer.json").read_text())
        assert trainer["optimizer_steps"] == 1
        assert trainer["reader"]["sources"][0]["sample"] == 2
        assert train(*stage) == 0  # goes on with its own checkpoint
        assert "goes on from" in capsys.readouterr().out
        before = run


def test_what_a_second_stage_may_not_change(train, tmp_path, capsys):
    assert train("train.steps=1", "train.eval_every=0") == 0
    other = [f"run.dir={tmp_path}/other", f"train.init_from={tmp_path}/run", "train.steps=1", "train.eval_every=0"]
    capsys.readouterr()
    assert train(*other, "model.layers=3") == 2
    assert "was written by another model: model.layers is 2 there and 3 here" in error_of(capsys)
    assert train(*other, "model.window=128", "model.rope_theta=50000.0") == 0
    assert "  model.window: 64 -> 128\n" in capsys.readouterr().out
    assert train("train.steps=2", "data.seq_len=128") == 2
    assert (
        "cursor has seq_len=64, this run has seq_len=128; for a second stage on other data give a new run.dir and"
        in error_of(capsys)
    )
    assert train("train.steps=2", "train.resume_data=false") == 2
    assert "train.resume_data=false needs train.resume=FOLDER" in error_of(capsys)
    assert train(f"train.resume={tmp_path}/run", f"train.init_from={tmp_path}/run") == 2
    assert "are both set" in error_of(capsys)
    assert train(f"run.dir={tmp_path}/new", "train.init_from=gone") == 2
    assert "no run or checkpoint folder" in error_of(capsys)


def test_a_second_stage_with_the_optimizer_reads_its_own_data_from_the_start(train, tmp_path, capsys):
    settings = ["train.eval_every=0", "train.warmup_steps=0", "train.min_lr=0.003"]
    assert train("train.steps=2", *settings) == 0
    new = [f"run.dir={tmp_path}/new", f"train.resume={tmp_path}/run", "train.resume_data=false", "data.seq_len=128"]
    capsys.readouterr()
    assert train("train.steps=3", *settings, *new) == 0
    told = capsys.readouterr().out
    assert "(step 2); data from the beginning\n" in told and "  data.seq_len: 64 -> 128\n" in told
    trainer = json.loads((tmp_path / "new/checkpoints/step-00000003/trainer.json").read_text())
    assert trainer["optimizer_steps"] == 3 and trainer["reader"]["sources"][0]["sample"] == 2
    assert train("train.steps=4", *settings, *new) == 0  # its own checkpoint, and where that one stopped reading
    trainer = json.loads((tmp_path / "new/checkpoints/step-00000004/trainer.json").read_text())
    assert trainer["optimizer_steps"] == 4 and trainer["reader"]["sources"][0]["sample"] == 4


def test_a_run_that_died_before_its_first_checkpoint_starts_over(train, tmp_path, monkeypatch):
    from titans_pretrain.training.trainer import Trainer

    def broken(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", broken)
        assert train("train.steps=2") == 2
    assert train("train.steps=2") == 0
    assert [line["step"] for line in without_clocks(tmp_path / "run")] == [1, 2, 2]


def test_a_full_disk_is_one_line_and_the_checkpoint_stays(train, tmp_path, capsys):
    assert train("train.steps=2") == 0
    before = files_of(tmp_path / "run/checkpoints/step-00000002")
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # writing more than that into one file fails
    try:
        assert train("train.steps=4") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = error_of(capsys)
    assert "step 4: cannot write" in message
    assert "File too large" in message
    assert "see to room, permission and mount there, then give the same command again" in message
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step-00000002"]
    assert files_of(tmp_path / "run/checkpoints/step-00000002") == before
    assert train("train.steps=4") == 0


def test_tensorboard_gets_every_number(train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train("train.steps=2", "run.tensorboard=true", "train.eval_every=2") == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (i + 1, pytest.approx(lines[i]["loss"])) for i in range(2)
    ]
    assert events.Scalars("validation_loss")[0].value == pytest.approx(lines[2]["validation_loss"])


@pytest.mark.parametrize("breaks_at", ["import", "log"])
def test_a_broken_wandb_does_not_end_the_run(train, tmp_path, monkeypatch, caplog, breaks_at):
    logged = []

    class Run:
        def log(self, values, step):
            logged.append((step, values["loss"]))
            if step == 2:
                raise ConnectionError("no\nnetwork")

    class Wandb:
        def init(self, **options):
            assert options["mode"] == "offline"
            assert options["project"] == "titans"
            return Run()

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None if breaks_at == "import" else Wandb())
    assert train("train.steps=3", "run.wandb=titans", "train.eval_every=0") == 0
    assert [step for step, _ in logged] == ([] if breaks_at == "import" else [1, 2])
    assert caplog.text.count("wandb is off: ") == 1
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 3
