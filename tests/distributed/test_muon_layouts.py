"""Muon, the average of the weights and the norms by group under layouts: what one process has.

Newton and Schulz's iteration runs in bfloat16, where a last bit of a momentum may be a whole step of an update. So it is compared to
the bit where the momentum is the same, and in the parameters' own dtype over whole trainings."""

import itertools

import pytest
import torch
import torch.distributed as dist
from parity import (
    CALM,
    FLOAT32,
    FLOAT64,
    case,
    fresh,
    micro_batches,
    resume_each,
    run_and_save,
    running_engine,
    train_alone,
    train_parallel,
    worst,
)
from torch import nn

from titans_pretrain.checkpoint import checkpoint_name, read_tensors
from titans_pretrain.parallel.layout import check_layout
from titans_pretrain.parallel.matrices import FlatMatrices, TensorMatrices
from titans_pretrain.parallel.mesh import Axis
from titans_pretrain.training import muon
from titans_pretrain.training.norms import GROUPS, group_of, read_norms
from titans_pretrain.training.validation import averaged_weights

LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"parallel__tp": 2}),
    "tp2-hidden": (2, {"parallel__tp": 2, "parallel__memory_split": "hidden"}),
    "pp2": (2, {"parallel__pp": 2}),
    "cp2": (2, {"parallel__cp": 2}),
    "zero1": (2, {"parallel__zero_stage": 1}),
    "zero2": (2, {"parallel__zero_stage": 2}),
    "tp2-dp2-zero1": (4, {"parallel__tp": 2, "parallel__zero_stage": 1}),
    "tp2-pp2": (4, {"parallel__tp": 2, "parallel__pp": 2}),
}
QUICK = {"tp2", "zero1"}
some = pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in LAYOUTS if n != "one"]
)


def values(layout: str, **changes) -> dict:
    dtype = "float32" if "zero" in layout or layout == "one" else "float64"
    layers = {"model__layers": 2, "model__pattern": ["mag", "mac"]}
    ours = {"train__optimizer": "muon", "train__ema": 0.9}
    return case("mag", dtype=dtype, **layers, **CALM, **ours, train__micro_batch=2, **LAYOUTS[layout][1], **changes)


def exactly(f, settings: dict, *args):
    """f with the iteration in the dtype of the parameters."""
    muon.DTYPE = getattr(torch, settings["dtype"])
    try:
        return f(settings, *args)
    finally:
        muon.DTYPE = torch.bfloat16


@some
def test_a_layout_trains_as_one_process(ranks, layout):
    settings = values(layout)
    expected = exactly(train_alone, settings)
    found = ranks(LAYOUTS[layout][0]).run(exactly, train_parallel, settings)
    limit = FLOAT64 if settings["dtype"] == "float64" else FLOAT32
    differences = worst(found, expected, floor=limit == FLOAT32)
    assert all(difference <= limit for difference in differences.values()), differences


def slices_and_pieces() -> bool:
    """On both ranks, of matrices of odd sizes: as slices of rows and of columns, and as pieces of a flat tensor."""
    rank, group = dist.get_rank(), dist.group.WORLD
    axis, draw = Axis(rank, 2, group, (0, 1)), torch.Generator().manual_seed(0)
    updates = [torch.randn(shape, generator=draw) for shape in ((6, 4), (3, 10), (8, 8), (10, 2))]
    for whole in updates:
        for dim in (0, 1):
            if whole.shape[dim] % 2:
                continue
            p = nn.Parameter(whole.chunk(2, dim)[rank].clone())
            p.tensor_model_parallel, p.partition_dim = True, dim
            ((where, direction, scale),) = TensorMatrices(axis)(p, p.detach())
            assert where is ... and scale == muon.scale_of(whole.shape)
            assert torch.equal(direction, muon.orthogonalized(whole).chunk(2, dim)[rank])
    size = sum(u.numel() for u in updates)
    flat = torch.zeros(size + size % 2 + 4)  # padded
    parameters, expected, at = [], torch.zeros_like(flat), 0
    for u in updates:
        flat[at : at + u.numel()] = u.flatten()
        parameters.append(nn.Parameter(flat[at : at + u.numel()].view(u.shape)))
        expected[at : at + u.numel()] = muon.orthogonalized(u).float().flatten() * muon.scale_of(u.shape)
        at += u.numel()
    piece = flat.chunk(2)[rank].clone()
    found = torch.zeros_like(piece)
    for where, direction, scale in FlatMatrices(parameters[::-1], axis, Axis())(piece, piece):
        found[where] += direction.float() * scale
    assert torch.equal(found, expected.chunk(2)[rank])
    return True


def test_parts_of_an_orthogonal_matrix_to_the_bit(ranks):
    assert ranks(2).run(slices_and_pieces) == [True, True]


def test_zero_3_is_refused_with_what_to_do():
    for key, value, told in (("optimizer", "muon", "whole matrices"), ("ema", 0.9, "never whole")):
        config, _ = fresh(case(parallel__zero_stage=3, **{f"train__{key}": value}))
        with pytest.raises(
            ValueError, match=f"train.{key}={value} .*{told}.* use parallel.zero_stage=1 or 2, or train"
        ):
            check_layout(config, 2)


SOURCES = ["one", "tp2", "zero1", "zero2", "pp2"]
BEFORE, AFTER = 3, 2
LIMITS = {"model": 2e-6, "ema": 2e-6, "momentum_buffer": 2e-5, "exp_avg": 2e-5, "exp_avg_sq": 2e-5}


def resumed(layout: str, ranks, checkpoints: list, folder) -> None:
    settings = values(layout) | {"dtype": "float32"}
    arguments = exactly, resume_each, settings, checkpoints, AFTER, folder
    arguments[0](*arguments[1:]) if layout == "one" else ranks(LAYOUTS[layout][0]).run(*arguments)


def saved(layout: str, ranks, steps: int, folder) -> dict:
    settings = values(layout) | {"dtype": "float32"}
    arguments = exactly, run_and_save, settings, steps, folder
    arguments[0](*arguments[1:]) if layout == "one" else ranks(LAYOUTS[layout][0]).run(*arguments)
    return folder / "checkpoints" / checkpoint_name(steps)


def difference(ours: dict, theirs: dict, kind: str) -> float:
    named = {name: t for name, t in theirs.items() if name.startswith(f"{kind}.")}
    least = torch.cat([t.flatten() for t in named.values()]).square().mean().sqrt()
    return max(float((ours[name] - t).abs().max() / max(t.abs().max(), least)) for name, t in named.items())


@pytest.mark.slow
def test_a_checkpoint_of_one_layout_goes_on_under_the_others(ranks, tmp_path):
    checkpoints = [saved(name, ranks, BEFORE, tmp_path / name) for name in SOURCES]
    straight = read_tensors(saved("one", ranks, BEFORE + AFTER, tmp_path / "straight"))
    kinds = {name.split(".")[0] for name in straight}
    assert kinds == LIMITS.keys()
    matrices = {n.partition(".")[2] for n in straight if n.startswith("momentum_buffer.")}
    assert not matrices & {n.partition(".")[2] for n in straight if n.startswith("exp_avg")}
    for layout in SOURCES:
        resumed(layout, ranks, checkpoints, tmp_path / f"on-{layout}")
        for number, (source, checkpoint) in enumerate(zip(SOURCES, checkpoints, strict=True)):
            folder = tmp_path / f"on-{layout}" / str(number) / "checkpoints"
            taken, there = read_tensors(folder / checkpoint_name(BEFORE)), read_tensors(checkpoint)
            assert taken.keys() == there.keys() and all(torch.equal(taken[n], t) for n, t in there.items())
            after = read_tensors(folder / checkpoint_name(BEFORE + AFTER))
            found = {kind: difference(after, straight, kind) for kind in LIMITS}
            assert all(found[kind] <= limit for kind, limit in LIMITS.items()), f"{found}, {source} under {layout}"
    for name, tensor in read_tensors(tmp_path / "on-one/0/checkpoints" / checkpoint_name(BEFORE + AFTER)).items():
        assert torch.equal(tensor, straight[name]), name


def looked_at(settings: dict) -> dict:
    """Norms by group of the second step, and the loss with the average of the weights after it."""
    config, model = fresh(settings)
    with running_engine(config, model) as (engine, mesh):
        place = () if mesh is None else (mesh.data.rank, mesh.data.size, mesh.context.rank, mesh.context.size)
        norms, whole = {}, 0.0
        for step in range(2):
            batches = micro_batches(config, step, *place)
            loss = engine.forward_backward(batches, engine.count(batches))
            engine.before_step = lambda: norms.update(read_norms(engine.group_squares()))
            named = list(engine.model.named_parameters())
            tensors = {"weight_norm": {n: p.detach().clone() for n, p in named}}
            if mesh is None:
                tensors["grad_norm"] = {n: p.grad.clone() for n, p in named}
            whole = float(engine.update(config.train.lr, loss))
        plain = engine.evaluate(batches)
        with averaged_weights(engine):
            average = engine.evaluate(batches)
        assert engine.evaluate(batches) == plain
        if mesh is None:
            for kind, group in itertools.product(tensors, GROUPS):
                naive = torch.cat([t.flatten() for n, t in tensors[kind].items() if group_of(n) == group]).norm()
                assert norms[f"{kind}.{group}"] == pytest.approx(float(naive), rel=1e-5)
        return norms | {"whole": whole, "average": average, "plain": plain}


@some
def test_norms_by_group_and_the_averages_loss_are_those_of_one_process(ranks, layout):
    settings = values(layout, train__grad_clip=0.01)
    expected = exactly(looked_at, settings | {"parallel": {}})
    assert {n.split(".")[1] for n in expected if "." in n} == set(GROUPS)
    squares = sum(x**2 for n, x in expected.items() if n.startswith("grad_norm."))
    assert squares**0.5 == pytest.approx(expected["whole"], rel=1e-5) and expected["whole"] > 0.01
    assert expected["average"] != expected["plain"]
    for found in ranks(LAYOUTS[layout][0]).run(exactly, looked_at, settings):
        assert found == pytest.approx(expected, rel=1e-5)
