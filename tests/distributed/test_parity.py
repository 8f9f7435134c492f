"""Every layout trains as one process does: losses, norms, the first step's gradients, the weights after three AdamW steps, and a
validation loss; with packed documents, padding, accumulation and clipping active.

float64 to 1e-9; where DeepSpeed, which has none, is part, float32 to 1e-5. Names of cases: degrees, then what is special.
"""

import functools
import json
import math

import pytest
from parity import CALM, FLOAT32, FLOAT64, HYBRIDS, case, train_alone, train_parallel, worst

VARIANTS = ("lmm", "mac", "mag", "mal", "transformer", *HYBRIDS)


def layout(**parallel) -> dict:
    """Changes of a case: parallel.*, or any "group__key"."""
    return {k if "__" in k else f"parallel__{k}": v for k, v in parallel.items()}


TWO = {
    "tp2": layout(tp=2),
    "tp2-sequence": layout(tp=2, sequence_parallel=True),
    "pp2": layout(pp=2),
    "cp2": layout(cp=2),
    "cp2-k3": layout(cp=2, segments_per_rank=3),
    "dp2": layout(),
    "dp2-zero1": layout(zero_stage=1),
    "dp2-zero2": layout(zero_stage=2),
    "dp2-zero3": layout(zero_stage=3),
}
FOUR = {
    "tp4": layout(tp=4),
    "cp4": layout(cp=4),
    "cp4-k3": layout(cp=4, segments_per_rank=3),
    "cp4-two-layers": layout(cp=4, segments_per_rank=3, model__layers=2),
    "tp2-pp2": layout(tp=2, pp=2),
    "tp2-cp2": layout(tp=2, cp=2),
    "pp2-cp2": layout(pp=2, cp=2, segments_per_rank=3),
    "dp2-cp2-zero1": layout(cp=2, zero_stage=1),
    "dp2-tp2-zero1": layout(tp=2, zero_stage=1),
    "dp2-tp2-zero2": layout(tp=2, zero_stage=2),
    "dp2-tp2-zero3": layout(tp=2, zero_stage=3),
}
EIGHT = {"tp2-pp2-cp2": layout(tp=2, pp=2, cp=2)}
# One of each mode, for every run of the tests (a hybrid stands for its variants, an option below for its layout): the other
# combinations are slow ones.
QUICK = {
    ("tp2-sequence", "mag"),
    ("tp2", "mag-lmm-transformer"),
    ("pp2", "mag-lmm-transformer"),
    ("cp4", "lmm"),  # of two ranks either is the other's left and right neighbour
    ("dp2-zero3", "lmm"),
    ("cp2-k3", "mag-lmm-transformer"),
}

# What does not depend on the variant, or is an option of one layout.
SPECIAL = {
    2: {
        "pp2-interleaved": ("mag", layout(pp=2, pipeline_schedule="interleaved", stages_per_rank=2)),
        "pp2-untied": ("mag", layout(pp=2, model__tie_embeddings=False)),
        "pp2-recompute-block": ("mac", layout(pp=2, train__recompute="block")),
        "pp2-recompute-segment": ("mag", layout(pp=2, train__recompute="segment", segments_per_rank=3)),
        "cp2-inflight": ("mal", layout(cp=2, segments_per_rank=2, inflight=3)),
        "cp2-recompute-block": ("mag", layout(cp=2, segments_per_rank=2, train__recompute="block")),
        "cp2-recompute-segment": ("mal", layout(cp=2, segments_per_rank=3, train__recompute="segment")),
        "cp2-recompute-segment-mac": ("mac", layout(cp=2, segments_per_rank=3, train__recompute="segment")),
        "cp2-memory-tokens": ("mac", layout(cp=2, model__mac__memory_tokens=5)),
        "cp2-untied": ("lmm", layout(cp=2, model__tie_embeddings=False)),
        "cp2-full-attention": ("transformer", layout(cp=2, segments_per_rank=2, model__window=None)),
        "cp2-telescoped": (
            "lmm",
            layout(
                cp=2, segments_per_rank=2, model__memory__step="telescoped", model__memory__depth=1,
                model__memory__residual_norm=False,
            ),
        ),
        "cp2-zero1": ("mag", layout(cp=2, zero_stage=1)),
        "cp2-zero2": ("mag", layout(cp=2, segments_per_rank=2, zero_stage=2)),
        "cp2-zero2-inflight": ("mag", layout(cp=2, segments_per_rank=2, zero_stage=2, inflight=2)),
        "pp2-zero1": ("mag", layout(pp=2, zero_stage=1)),
        "zero1-recompute-block": ("mag", layout(zero_stage=1, train__recompute="block")),
        "zero2-recompute-segment": ("mag", layout(zero_stage=2, train__recompute="segment", segments_per_rank=3)),
        "zero3-recompute-block": ("mag", layout(zero_stage=3, train__recompute="block", train__micro_batch=2)),
        "zero1-offload": ("mag", layout(zero_stage=1, offload_optimizer=True)),
        "zero2-offload": ("mag", layout(zero_stage=2, offload_optimizer=True)),
        "zero3-offload": ("mag", layout(zero_stage=3, offload_optimizer=True)),
        "zero3-untied": ("lmm", layout(zero_stage=3, model__tie_embeddings=False)),
        "tp2-hidden": ("mag", layout(tp=2, memory_split="hidden")),
        "tp2-hidden-one-head": ("lmm", layout(tp=2, memory_split="hidden", model__memory__heads=1)),
        "tp2-sequence-mac": ("mac", layout(tp=2, sequence_parallel=True)),
        "tp2-hidden-mac": ("mac", layout(tp=2, memory_split="hidden")),
        "tp2-recompute-segment": ("mag", layout(tp=2, train__recompute="segment", segments_per_rank=3)),
    },
    4: {
        "tp2-cp2-sequence": ("mag", layout(tp=2, cp=2, sequence_parallel=True)),
        "tp2-pp2-sequence": ("mal", layout(tp=2, pp=2, sequence_parallel=True)),
        "tp2-pp2-zero1": ("mag", layout(tp=2, pp=2, zero_stage=1)),
        "pp4": ("mag", layout(pp=4)),
        "pp2-cp2-interleaved": ("mag", layout(pp=2, cp=2, pipeline_schedule="interleaved", stages_per_rank=2)),
    },
}  # fmt: skip
QUICK_SPECIAL = {
    "pp2-interleaved",
    "cp2-zero1",
    "zero2-recompute-segment",
    "tp2-hidden",
    "pp2-zero1",
}


@functools.cache
def _alone(key: str) -> dict:
    return train_alone(json.loads(key))


def alone(values: dict) -> dict:
    """What one process ends with; of how a layout computes it nothing is left in the key."""
    train = {k: v for k, v in values["train"].items() if k not in ("micro_batch", "recompute")}
    return _alone(json.dumps(values | {"parallel": {}, "train": train}, sort_keys=True))


def check(ranks, world: int, variant: str, changes: dict) -> None:
    zero = changes.get("parallel__zero_stage", 0)
    if zero:
        changes = CALM | changes
    values = case(variant, dtype="float32" if zero else "float64", **changes)
    if (
        world == math.prod(values["parallel"].get(axis, 1) for axis in ("tp", "cp"))
        and "inflight" not in values["parallel"]
    ):
        values["train"]["micro_batch"] = 2  # accumulation takes two passes, where there are neither copies nor stages
    reference = alone(values)
    found = worst(ranks(world).run(train_parallel, values), reference, floor=bool(zero))
    limit = FLOAT32 if zero else FLOAT64
    assert max(found.values()) < limit, found


def grid(layouts: dict, world: int) -> list:
    return [
        pytest.param(world, variant, changes, id=f"{name}-{variant}", marks=_marks((name, variant) in QUICK))
        for name, changes in layouts.items()
        for variant in VARIANTS
        if not (name == "cp4-two-layers" and len(HYBRIDS.get(variant, {}).get("pattern", ())) > 2)
    ]


def _marks(quick: bool) -> list:
    return [] if quick else [pytest.mark.slow]


@pytest.mark.parametrize(("world", "variant", "changes"), grid(TWO, 2) + grid(FOUR, 4) + grid(EIGHT, 8))
def test_a_layout_trains_as_one_process(ranks, world, variant, changes):
    check(ranks, world, variant, changes)


@pytest.mark.parametrize(
    ("world", "variant", "changes"),
    [
        pytest.param(world, variant, changes, id=name, marks=_marks(name in QUICK_SPECIAL))
        for world, cases in SPECIAL.items()
        for name, (variant, changes) in cases.items()
    ],
)
def test_an_option_trains_as_one_process(ranks, world, variant, changes):
    check(ranks, world, variant, changes)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_stays_near_float32(ranks, stage):
    values = case("mag", train__precision="bf16", parallel__zero_stage=stage)
    reference = train_alone(case("mag"))
    found = ranks(2).run(train_parallel, values)
    differences = worst(found, reference)
    assert differences["losses"] < 6e-3
    assert differences["norms"] < 3e-2
    assert differences["losses"] > 1e-6  # it did compute in bfloat16
