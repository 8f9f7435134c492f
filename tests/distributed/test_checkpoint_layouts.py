"""A checkpoint written under any layout goes on under any other: the same tensors to the bit, and the same training."""

from pathlib import Path

import pytest
import torch
from parity import CALM, FLOAT32, case, resume_each, run_and_save

from titans_pretrain.checkpoint import checkpoint_name, load_model, read_tensors

LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"parallel__tp": 2}),
    "pp2": (2, {"parallel__pp": 2}),
    "cp2": (2, {"parallel__cp": 2}),
    "zero1": (2, {"parallel__zero_stage": 1}),
    "zero2": (2, {"parallel__zero_stage": 2}),
    "zero3": (2, {"parallel__zero_stage": 3}),
    "zero1-bf16": (2, {"parallel__zero_stage": 1, "train__precision": "bf16"}),
    "tp2-pp2": (4, {"parallel__tp": 2, "parallel__pp": 2}),
}
EXACT = [name for name in LAYOUTS if "bf16" not in name]
QUICK = {"one", "tp2", "zero1", "zero3"}
BEFORE, AFTER = 3, 2


def values(layout: str = "one", **changes) -> dict:
    return case("mag", **CALM, **LAYOUTS[layout][1], **changes)


def on(ranks, world: int, f, *args) -> list:
    return [f(*args)] if world == 1 else ranks(world).run(f, *args)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """saved(layout): a checkpoint that it wrote after three steps."""
    made: dict[str, Path] = {}

    def get(layout: str) -> Path:
        if layout not in made:
            world = LAYOUTS[layout][0]
            folder = tmp_path_factory.mktemp(layout)
            on(ranks, world, run_and_save, values(layout), BEFORE, folder)
            made[layout] = folder / "checkpoints" / checkpoint_name(BEFORE)
        return made[layout]

    return get


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_and_save(values(), BEFORE + AFTER, folder)
    return read_tensors(folder / "checkpoints" / checkpoint_name(BEFORE + AFTER))


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[] if n in QUICK - {"zero3"} else [pytest.mark.slow]) for n in LAYOUTS]
)
def test_a_layout_goes_on_from_every_other(ranks, saved, uninterrupted, tmp_path, layout, request):
    slow = "slow" in {mark.name for mark in request.node.own_markers}
    sources = list(LAYOUTS) if slow else sorted(QUICK)
    world = LAYOUTS[layout][0]
    checkpoints = [saved(source) for source in sources]
    on(ranks, world, resume_each, values(layout), checkpoints, AFTER, tmp_path)
    for number, (source, checkpoint) in enumerate(zip(sources, checkpoints, strict=True)):
        folder = tmp_path / str(number) / "checkpoints"
        before, loaded = read_tensors(checkpoint), read_tensors(folder / checkpoint_name(BEFORE))
        assert loaded.keys() == before.keys()
        for name, tensor in before.items():
            assert torch.equal(loaded[name], tensor), f"{name}, from {source}"
        after = read_tensors(folder / checkpoint_name(BEFORE + AFTER))
        limit = FLOAT32 if layout in EXACT and source in EXACT else 0.2
        weights = {name: t for name, t in uninterrupted.items() if name.startswith("model.")}
        least = torch.cat([t.flatten() for t in weights.values()]).square().mean().sqrt()
        for name, tensor in weights.items():
            difference = (after[name] - tensor).abs().max() / max(tensor.abs().max(), least)
            assert difference < limit, f"{name}, from {source}"


@pytest.mark.parametrize("layout", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in LAYOUTS])
def test_one_process_reads_the_model_of_any_layout(saved, layout):
    """As export, generation and evaluation do."""
    model, _ = load_model(saved(layout))
    tensors = read_tensors(saved(layout))
    for name, p in model.named_parameters():
        assert torch.equal(p, tensors[f"model.{name}"].to(p.dtype))


def test_shapes_that_do_not_fit_are_named_on_every_rank(ranks, saved, tmp_path):
    with pytest.raises(
        AssertionError, match=r"does not fit the model: .*first is exp_avg.layers.0.mlp.down_proj.weight"
    ):
        on(ranks, 2, resume_each, values("tp2", model__ffn_dim=64), [saved("one")], 1, tmp_path)


def fail_on_one_rank(settings: dict, run_dir: Path) -> str:
    import torch.distributed as dist

    from titans_pretrain.checkpoint import state

    class Full(state.dcp.FileSystemWriter):
        def write_data(self, *args):
            raise OSError(28, "No space left on device")

    writer = state.dcp.FileSystemWriter
    if dist.get_rank() == 1:
        state.dcp.FileSystemWriter = Full
    try:
        run_and_save(settings, 1, run_dir)
    except OSError as e:
        return str(e)
    finally:
        state.dcp.FileSystemWriter = writer
    return ""


def test_a_full_disk_on_one_rank_is_told_on_all_and_leaves_nothing(ranks, tmp_path):
    for message in ranks(2).run(fail_on_one_rank, values(), tmp_path):
        assert "step 1: cannot write" in message and "No space left on device" in message
    assert list((tmp_path / "checkpoints").iterdir()) == []
