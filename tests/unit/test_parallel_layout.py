"""Degrees, stages and settings that need no process group."""

import itertools
import random

import pytest

from titans_pretrain.config.load import from_dict
from titans_pretrain.config.model import ModelConfig
from titans_pretrain.parallel.layout import check_layout, cut_layers, stage_layers
from titans_pretrain.parallel.zero_settings import zero_settings


def config(**groups):
    return from_dict({"data": {"seq_len": 1024}, "train": {"micro_batch": 2, "global_batch": 16}} | groups)


def test_the_data_parallel_degree_is_what_the_others_leave():
    assert check_layout(config(parallel={"tp": 2, "cp": 2}), 16) == 4
    assert check_layout(config(), 1) == 1


@pytest.mark.parametrize(
    ("groups", "world", "told"),
    [
        ({"parallel": {"tp": 2, "cp": 2}}, 6, "6 processes do not divide into .* = 4; start 8 processes"),
        ({}, 3, "train.global_batch=16 must be a multiple of .* = 6; try train.global_batch=18"),
        ({"parallel": {"tp": 3}}, 3, "parallel.tp=3"),
        ({"parallel": {"pp": 8}}, 8, "model.layers=4 is fewer than 8 pipeline stages .* lower parallel.pp to 4"),
        ({"parallel": {"pp": 4}, "train": {"micro_batch": 8, "global_batch": 16}}, 4, "try train.global_batch=32"),
        (
            {"parallel": {"pipeline_schedule": "interleaved", "stages_per_rank": 2}},
            1,
            "stages_per_rank=2 .* parallel.pp=1 has no pipeline",
        ),
        (
            {"train": {"batch_warmup": [[0, 4], [5, 16]]}},
            4,
            "train.batch_warmup=4 must be a multiple .* = 8; try train.batch_warmup=8",
        ),
        (
            {"parallel": {"pp": 4}, "train": {"batch_warmup": [[0, 4], [5, 16]]}},
            4,
            "parallel.pp=4 needs as many micro-batches in a step, got 2: try train.batch_warmup=8",
        ),
        (
            {
                "parallel": {"pp": 2, "pipeline_schedule": "interleaved", "stages_per_rank": 2},
                "train": {"batch_warmup": [[0, 10], [5, 16]]},
            },
            2,
            "micro-batches in 2 equal rounds, got 5: try train.batch_warmup=8",
        ),
        (
            {
                "parallel": {"tp": 2, "sequence_parallel": True},
                "data": {"seq_len": 1026, "seq_len_warmup": [[0, 171], [5, 1026]], "reset_documents": False},
            },
            2,
            "segments of a multiple of parallel.tp=2 tokens, got data.seq_len_warmup=171",
        ),
        ({"parallel": {"inflight": 2}}, 1, "parallel.inflight=2 fills a context-parallel ring"),
        ({"parallel": {"zero_stage": 2, "pp": 2}}, 2, "use parallel.zero_stage=1"),
        ({"parallel": {"zero_stage": 3, "cp": 2}}, 2, "at different layers; use parallel.zero_stage=2"),
        (
            {"parallel": {"zero_stage": 3}, "train": {"recompute": "segment"}},
            2,
            "zero_stage=3 cannot run .* in segments",
        ),
    ],
)
def test_a_layout_that_cannot_work_names_one_that_does(groups, world, told):
    values = groups | {"train": {"micro_batch": 2, "global_batch": 16} | groups.get("train", {})}
    with pytest.raises(ValueError, match=told):
        check_layout(config(**values), world)


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ({"parallel": {"cp": 3}}, "must divide into parallel.cp=3 .* try data.seq_len=1056"),
        ({"parallel": {"cp": 2, "segments_per_rank": 64}}, "each a multiple of 16 .* try data.seq_len=2048"),
        ({"train": {"truncate_state_gradient_every": 512}}, "must be a multiple of a segment's 1024 tokens"),
        ({"parallel": {"stages_per_rank": 2}}, "does not go with parallel.pipeline_schedule=1f1b"),
        ({"parallel": {"offload_optimizer": True}}, "needs parallel.zero_stage=1, 2 or 3"),
    ],
)
def test_a_config_that_cannot_be_cut_says_what_would_do(groups, told):
    with pytest.raises(ValueError, match=told):
        config(**groups)


def test_stages_are_balanced_as_well_as_any_cut_can_be():
    r = random.Random(0)
    for _ in range(50):
        layers = r.randint(1, 8)
        stages = r.randint(1, layers)
        costs = [r.random() for _ in range(layers)]
        first, last = r.random(), 3 * r.random()

        def dearest(cuts, costs=costs, first=first, last=last):
            sums = [sum(costs[cut.start : cut.stop]) for cut in cuts]
            return max(
                [
                    sums[0] + first + (last if len(sums) == 1 else 0),
                    *sums[1:-1],
                    *([sums[-1] + last] if len(sums) > 1 else []),
                ]
            )

        found = cut_layers(costs, first, last, stages)
        assert [i for cut in found for i in cut] == list(range(layers))
        assert all(len(cut) for cut in found) and len(found) == stages
        best = min(
            dearest([range(a, b) for a, b in itertools.pairwise((0, *cuts, layers))])
            for cuts in itertools.combinations(range(1, layers), stages - 1)
        )
        assert dearest(found) == pytest.approx(best)


def test_a_large_vocabulary_takes_layers_from_the_last_stage():
    few, many = (stage_layers(ModelConfig(vocab_size=v, layers=12), 2, 1024)[-1] for v in (256, 50000))
    assert len(many) < len(few)


def test_a_dear_layer_of_a_pattern_counts_for_more():
    cheap = {"variant": "transformer", "window": 16, "ffn_dim": 64}
    dear = {"variant": "lmm", "ffn_dim": 8192}
    for place, expected in ((0, [1, 5]), (5, [5, 1]), (2, [3, 3])):
        pattern = [dear if i == place else cheap for i in range(6)]
        stages = stage_layers(ModelConfig(pattern=pattern, layers=6, vocab_size=256), 2, 1024)
        assert [len(stage) for stage in stages] == expected
    wide = {"variant": "transformer", "window": None}  # as dear as its sequence is long
    model = ModelConfig(pattern=[wide, *[cheap] * 5], layers=6, vocab_size=256)
    assert len(stage_layers(model, 2, 2**20)[0]) < len(stage_layers(model, 2, 64)[0])


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"gradient_clipping": 5.0}, "deepspeed.gradient_clipping=5.0 contradicts train.grad_clip"),
        ({"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage=2 contradicts parallel.zero_stage"),
        ({"fp16": {"enabled": True}}, "contradicts train.precision"),
        ({"optimizer": {"type": "AdamW"}}, "contradicts train.optimizer"),
        ({"zero_optimization": {"overlap_comm": True}}, "this trainer needs False"),
    ],
)
def test_a_deepspeed_setting_that_contradicts_the_config_is_refused(block, told):
    with pytest.raises(ValueError, match=told):
        zero_settings(config(parallel={"zero_stage": 1}, deepspeed=block), 1)


def test_other_deepspeed_settings_pass_through():
    block = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": False, "gradient_clipping": 1.0}
    found = zero_settings(config(parallel={"zero_stage": 1}, deepspeed=block), 1)
    assert found["zero_optimization"] | {"reduce_bucket_size": 1000, "stage": 1} == found["zero_optimization"]
    assert found["wall_clock_breakdown"] is False
