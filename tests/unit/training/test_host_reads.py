"""A training step gives the device its work and does not wait for it: the numbers are read once per interval.

The host's reads are counted on a CPU, where the same code runs; what may look at values that are at hand there is told that they
are not. The forward and backward pass run on the meta device too, whose values no one can read."""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).parents[2] / "kernels"))  # its helpers
from no_sync import READS, NoSync
from test_trainer import assert_same, run, weights

from titans_pretrain.config import load_config
from titans_pretrain.data.reader import Batch
from titans_pretrain.kernels import backends
from titans_pretrain.models import build_model
from titans_pretrain.parallel import segments
from titans_pretrain.parallel.apply import build_engine
from titans_pretrain.parallel.mesh import Mesh
from titans_pretrain.parallel.ring import LocalLink
from titans_pretrain.parallel.stage import Stage
from titans_pretrain.training.engine import SingleEngine
from titans_pretrain.training.loggers import read_metrics
from titans_pretrain.training.trainer import Trainer

VARIANTS = ["lmm", "mac", "mag", "mal", "transformer"]


class HostReads(TorchDispatchMode):
    """Counts what the host waits for: operations with a value for it, and copies of whole tensors."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self._patches = contextlib.ExitStack()

    def __enter__(self):
        for name in ("tolist", "numpy", "cpu"):
            call = getattr(torch.Tensor, name)

            def counted(x, *args, name=name, call=call, **kwargs):
                self.names.append(name)
                return call(x, *args, **kwargs)

            self._patches.enter_context(mock.patch.object(torch.Tensor, name, counted))
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS and not (name == "repeat_interleave" and "self_int" in func._overloadname):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Rows:
    """The same two documents for ever."""

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        tokens = torch.arange(2 * 128).view(2, 128) * 7 % 512
        return Batch(tokens, tokens.roll(-1, 1), (torch.arange(128) % 64).expand(2, -1).contiguous())

    def state_dict(self) -> dict:
        return {}


def config_of(variant: str, *overrides: str):
    return load_config("configs/tiny.yaml", [f"model.variant={variant}", "train.log_every=2", *overrides])


@pytest.fixture
def far_away(monkeypatch):
    """Nobody looks at values because they are at hand."""
    looks = backends.values_at_hand
    for module in list(sys.modules.values()):
        if getattr(module, "values_at_hand", None) is looks:
            monkeypatch.setattr(module, "values_at_hand", lambda x: False)


@pytest.mark.parametrize(
    ("variant", "recompute"), [(v, "none") for v in VARIANTS] + [("mac", "segment"), ("mag", "block")]
)
def test_numbers_are_read_once_per_interval(variant, recompute, far_away):
    config = config_of(variant, f"train.recompute={recompute}")
    torch.manual_seed(0)
    engine = build_engine(config, build_model(config.model), Mesh(torch.device("cpu")))
    trainer = Trainer(config, engine, Rows(), None, torch.device("cpu"))
    trainer.read_every = config.train.log_every  # as on a GPU
    reads = []
    for _ in range(2):
        drawn = trainer._draw()  # looks at rows that are still on the host
        with mock.patch.object(trainer, "_draw", lambda drawn=drawn: drawn), HostReads() as counted:
            trainer.train_step()
            if trainer.step == 2:
                trainer.read()
        reads.append(counted.names)
    assert reads == [[], ["tolist"]]
    assert [line["step"] for line in trainer._unreported] == [1, 2]
    assert all(isinstance(line[name], float) for line in trainer._unreported for name in ("loss", "grad_norm"))


def test_a_read_is_counted():
    with HostReads() as counted:
        x = torch.ones(3)
        float(x.sum()), bool(x[0] > 0), x.tolist(), x.nonzero()
    assert counted.names == ["_local_scalar_dense"] * 2 + ["tolist", "nonzero"]


@pytest.mark.parametrize(
    "variant", [x if x in ("mac", "mag") else pytest.param(x, marks=pytest.mark.slow) for x in VARIANTS]
)
def test_the_model_waits_for_no_device_and_makes_nothing_elsewhere(variant):
    config = config_of(variant)
    with torch.device("meta"):
        model = build_model(config.model)
    batch = {name: x.to("meta") for name, x in next(Rows())._asdict().items()}
    with NoSync(), torch.autocast("cpu", enabled=False):
        model(**batch, num_items_in_batch=200).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "recompute",
    [pytest.param("none", marks=pytest.mark.slow), pytest.param("block", marks=pytest.mark.slow), "segment"],
)
def test_segments_wait_for_no_device(recompute, monkeypatch):
    config = config_of("mag")
    with torch.device("meta"):
        model = build_model(config.model)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)  # the meta device has no autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    monkeypatch.setattr(segments._Pass, "_autocast", lambda self: contextlib.nullcontext())
    stage = segments.SegmentedStage(Stage(model, range(2)), LocalLink(), 2, recompute)
    rows = torch.empty(2, 128, dtype=torch.int64, device="meta")
    with NoSync():
        stage(rows, positions=rows, labels=rows).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def poison(trainer, step: int, where: str) -> None:
    forward = trainer.engine.model.forward

    def poisoned(*args, **kwargs):
        out = forward(*args, **kwargs)
        if trainer.step == step - 1:
            if where == "loss":
                out.loss = out.loss * torch.nan
            else:
                out.loss.register_hook(lambda g: g * torch.inf)
        return out

    trainer.engine.model.forward = poisoned


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_found_late_has_changed_no_weight(make_trainer, tmp_path, where):
    """The step is named, the lines before it are logged, and the weights are those of the step before, whatever came after."""
    twin = make_trainer(log_every=5)
    twin.train_step(), twin.train_step()
    trainer = make_trainer(steps=20, log_every=5, checkpoint_every=4)
    trainer.read_every = 5
    poison(trainer, 3, where)
    with pytest.raises(ValueError, match="step 3: the loss is .*no checkpoint was written yet"):
        run(trainer, tmp_path)
    assert trainer.step == 4  # a checkpoint was due: it looked, and wrote none
    assert not list((tmp_path / "checkpoints").iterdir())
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert_same(weights(trainer), weights(twin))
    states = (t.engine.optimizer.state_dict()["state"] for t in (trainer, twin))
    for mine, other in zip(*(s.values() for s in states), strict=True):
        assert_same(mine, other)


def test_saving_looks_first(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.read_every = 100
    poison(trainer, 1, "loss")
    trainer.train_step()
    with pytest.raises(ValueError, match="step 1: the loss is nan"):
        trainer.save(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_metrics_are_the_same_read_late(make_trainer, tmp_path):
    """Every step has its line, in the order of the steps and validations; only the speed is that of an interval."""
    options = dict(steps=7, validate=True, eval_every=2, log_every=3, checkpoint_every=5)
    lines = []
    for name, every in (("at_once", 1), ("late", 3)):
        trainer = make_trainer(**options)
        trainer.read_every = every
        run(trainer, tmp_path / name)
        timed = ("tokens_per_second", "data_wait", "checkpoint_stall", "peak_memory_mib")
        lines.append(
            [{k: v for k, v in x.items() if k not in timed} for x in read_metrics(tmp_path / name / "metrics.jsonl")]
        )
    assert json.dumps(lines[0]) == json.dumps(lines[1])
    assert [(x["step"], "loss" in x) for x in lines[0]][:4] == [(1, True), (2, True), (2, False), (3, True)]


def test_lines_are_not_lost_where_the_data_ends_the_run(make_trainer, tmp_path):
    trainer = make_trainer(steps=20)
    trainer.read_every = 10
    draw = trainer.reader._draw

    def failing(row):
        if row >= 16:
            raise OSError("gone")
        return draw(row)

    trainer.reader._draw = failing
    with pytest.raises(OSError, match="gone"):
        run(trainer, tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_gpu_is_asked_once_per_interval(make_trainer):
    config, stub = make_trainer(log_every=7).config, make_trainer().engine.model
    cpu, meta = torch.device("cpu"), torch.device("meta")
    engine = SingleEngine(config, stub, cpu)
    assert Trainer(config, engine, Rows(), None, cpu).read_every == 1
    assert Trainer(config, engine, Rows(), None, meta).read_every == 7
