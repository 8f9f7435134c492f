"""What a model starts from depends on the seed alone: the same to the bit under every layout, and made part by part."""

import gc

import pytest
import torch
from parity import case, fresh, full_tensors

from titans_pretrain.models.initialize import initialize, named_parts
from titans_pretrain.parallel import apply
from titans_pretrain.parallel.apply import build_engine
from titans_pretrain.parallel.mesh import Mesh, build_mesh, leave_mesh

LAYOUTS = {
    "tp2": (2, {"parallel__tp": 2}),
    "tp2-hidden": (2, {"parallel__tp": 2, "parallel__memory_split": "hidden", "model__memory__depth": 2}),
    "pp2-interleaved": (
        2,
        {"parallel__pp": 2, "parallel__pipeline_schedule": "interleaved", "parallel__stages_per_rank": 2},
    ),
    "cp2": (2, {"parallel__cp": 2, "train__recompute": "segment"}),
    "dp2-zero1": (2, {"parallel__zero_stage": 1}),
    "dp2-zero3": (2, {"parallel__zero_stage": 3}),
    "tp2-pp2": (4, {"parallel__tp": 2, "parallel__pp": 2}),
}
QUICK = {"pp2-interleaved", "dp2-zero3"}


def values_of(layout: str, **changes) -> dict:
    return case("mac", model__tie_embeddings=False, train__seed=3, **LAYOUTS[layout][1], **changes)


def start(values: dict) -> dict:
    """On a rank, after the engine was built: its logical tensors, the bytes that it keeps of each part, and those that all
    parameters took when a part was made."""
    config, model = fresh(values)
    mesh, taken, before = build_mesh(config, torch.device("cpu")), {}, alive()
    initialise = apply.initialize_part

    def watched(part, name, seed):
        initialise(part, name, seed)
        taken[name] = alive() - before

    apply.initialize_part = watched
    try:
        engine = build_engine(config, model, mesh)
        kept = {name: bytes_of(part) for name, part in named_parts(engine.model).items()}
        return {"tensors": full_tensors(engine, mesh, _value), "kept": kept, "taken": taken}
    finally:
        apply.initialize_part, engine, model = initialise, None, None
        gc.collect()
        leave_mesh()


def bytes_of(part: torch.nn.Module) -> int:
    return sum(getattr(p, "ds_tensor", p).nbytes for p in part.parameters())


def alive() -> int:
    """Bytes of all parameters in this process, whoever holds them."""
    gc.collect()
    return sum(p.nbytes for p in gc.get_objects() if type(p) is torch.nn.Parameter and not p.is_meta)


def _value(engine, p):
    if not hasattr(p, "ds_id"):
        return p
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(p)


@pytest.mark.parametrize("layout", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def test_every_layout_starts_from_the_same_values(ranks, layout):
    values = values_of(layout)
    config, model = fresh(values | {"parallel": {}})
    whole = {name: bytes_of(part) for name, part in named_parts(model).items()}
    expected = dict(build_engine(config, model, Mesh(torch.device("cpu"))).model.named_parameters())
    seen, kept = set(), 0
    for found in ranks(LAYOUTS[layout][0]).run(start, values):
        for name, tensor in found["tensors"].items():
            assert torch.equal(tensor, expected[name]), name
        seen |= found["tensors"].keys()
        done = 0
        for name, taken in found["taken"].items():
            assert taken <= done + whole[name]
            done += found["kept"][name]
        kept += done
    assert seen == expected.keys()
    if layout == "pp2-interleaved":
        assert kept == sum(whole.values())


def test_parts_are_initialised_as_the_whole_model_is():
    config, model = fresh(case("mag", train__seed=3))
    whole = model.to_empty(device="cpu")
    initialize(whole, 3)
    config, model = fresh(case("mag", train__seed=3))
    ours = build_engine(config, model, Mesh(torch.device("cpu"))).model
    for (name, a), (_, b) in zip(whole.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(ours.layers[0].mlp.up_proj.weight, ours.layers[1].mlp.up_proj.weight)


def test_what_a_checkpoint_follows_is_not_initialised(monkeypatch):
    monkeypatch.setattr(apply, "initialize_part", None)
    for changes in ({}, {"parallel__segments_per_rank": 2}):
        config, model = fresh(case("mag", **changes))
        built = build_engine(config, model, Mesh(torch.device("cpu")), initialise=False).model
        assert all(p.isnan().all() for p in built.parameters())
