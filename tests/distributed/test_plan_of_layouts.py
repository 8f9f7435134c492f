"""What `titans-pretrain plan` says of a layout, against processes that run it."""

import pytest
import torch
from parity import case, fresh, micro_batches

from benchmarks import plan
from titans_pretrain.commands.layout import build_layout


def measure(values: dict) -> dict:
    """On one rank, after a step: what it holds, in bytes, and what it sent."""
    import gc

    from titans_pretrain.parallel.apply import build_engine
    from titans_pretrain.parallel.mesh import build_mesh, leave_mesh

    config, model = fresh(values)
    mesh = build_mesh(config, torch.device("cpu"))
    try:
        engine = build_engine(config, model, mesh)
        place = mesh.data.rank, mesh.data.size, mesh.context.rank, mesh.context.size
        batches = micro_batches(config, 0, *place)
        loss = engine.forward_backward(batches, engine.count(batches))
        engine.update(1e-3, loss)
        parameters = list(engine.model.parameters())
        inner = engine.zero.optimizer.optimizer if engine.zero else engine.optimizer
        moments = [t for state in inner.state.values() for t in state.values() if t.dim()]
        masters = []
        if engine.zero:
            flat = [t for group in inner.param_groups for t in group["params"]]
            masters = getattr(engine.zero.optimizer, "fp32_partitioned_groups_flat", flat)  # stage 3 empties its groups
        links = [module.link for module in engine.modules if mesh.context.size > 1]
        return {
            "place": (mesh.context.rank, mesh.pipeline.rank),
            "numbers": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
            "parameters": sum(getattr(p, "ds_tensor", p).nbytes for p in parameters),
            "optimizer": sum(t.nbytes for t in (*moments, *masters)),
            "sent": sum(t.bytes for link in links for t in link.traffic.values()),
        }
    finally:
        engine = model = None
        gc.collect()
        leave_mesh()


CASES = {
    "hybrid-cp2-k3": (2, "mag-lmm-transformer", {"parallel__cp": 2, "parallel__segments_per_rank": 3}),
    "hybrid-tp2": (2, "mac-mal", {"parallel__tp": 2}),
    "cp2-k3": (2, "mag", {"parallel__cp": 2, "parallel__segments_per_rank": 3}),
    "cp2-full-attention": (2, "transformer", {"parallel__cp": 2, "model__window": None, "train__micro_batch": 2}),
    "zero2-bf16": (2, "mal", {"parallel__zero_stage": 2, "train__precision": "bf16"}),
    "zero1-bf16": (2, "mag", {"parallel__zero_stage": 1, "train__precision": "bf16"}),
    "zero3": (2, "lmm", {"parallel__zero_stage": 3}),
    "pp2-interleaved": (
        2, "mag", {"parallel__pp": 2, "parallel__pipeline_schedule": "interleaved", "parallel__stages_per_rank": 2},
    ),
    "tp2-hidden": (2, "mag", {"parallel__tp": 2, "parallel__memory_split": "hidden"}),
    "tp2-cp2": (4, "mal", {"parallel__tp": 2, "parallel__cp": 2, "parallel__segments_per_rank": 2}),
    "tp2-cp2-mac": (4, "mac", {"parallel__tp": 2, "parallel__cp": 2}),
    "pp2-cp2": (4, "mag", {"parallel__pp": 2, "parallel__cp": 2, "parallel__segments_per_rank": 2}),
}  # fmt: skip
QUICK = {"hybrid-cp2-k3"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES]
)
def test_a_plan_tells_what_processes_hold_and_send(ranks, name):
    world, variant, changes = CASES[name]
    values = case(variant, **changes)
    config, _ = fresh(values)
    layout = build_layout(config, world)
    for found in ranks(world).run(measure, values):
        context_rank, pipeline_rank = found["place"]
        planned = layout.memory(pipeline_rank)
        assert found["numbers"] == layout.parameters(pipeline_rank)
        # ZeRO fills partitions up to equal sizes.
        assert found["parameters"] == pytest.approx(planned["parameters"], rel=0.02)
        assert found["optimizer"] == pytest.approx(planned["optimizer"], rel=0.02)
        sent = layout.micro_batches * layout.ring_bytes(context_rank, pipeline_rank) if config.parallel.cp > 1 else 0
        assert found["sent"] == sent


QUICK_ACTIVATIONS = {"tp 2"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK_ACTIVATIONS else [pytest.mark.slow]) for name in plan.LAYOUTS],
)
def test_a_plan_tells_within_a_tenth_what_activations_processes_hold(ranks, name):
    world, changes = plan.LAYOUTS[name]
    found = [plan.measure(changes)] if world == 1 else ranks(world).run(plan.measure, changes)
    for place, planned, measured in plan.compare(world, changes, found):
        assert planned == pytest.approx(measured, rel=0.1), f"pipeline rank {place}"
