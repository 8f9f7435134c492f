"""Keys of the `deepspeed:` block that DeepSpeed would pass over without a word."""

import sys

import pytest

from titans_pretrain.config import Config, ParallelConfig
from titans_pretrain.parallel.zero_keys import check_block


def config(block: dict) -> Config:
    return Config(parallel=ParallelConfig(zero_stage=1), deepspeed=block)


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"wall_clock_brakdown": True}, "unknown key deepspeed.wall_clock_brakdown, .* did you mean wall_clock_breakdown"),
        ({"zero_optimisation": {}}, "unknown key deepspeed.zero_optimisation, .* did you mean zero_optimization"),
        ({"zero_optimization": {"reduce_buket_size": 1}}, r"deepspeed: reduce_buket_size: unknown key \(DeepSpeedZeroConfig\)"),
        ({"zero_optimization": {"reduce_bucket_size": "x"}}, "deepspeed: reduce_bucket_size: .* got 'x'"),
        ({"gradient_clipping": 5.0}, "contradicts train.grad_clip"),
    ],
)  # fmt: skip
def test_what_deepspeed_does_not_know_is_refused(block, told):
    pytest.importorskip("deepspeed")
    with pytest.raises(ValueError, match=told) as e:
        check_block(config(block))
    assert "\n" not in str(e.value)


def test_what_deepspeed_knows_is_taken():
    pytest.importorskip("deepspeed")
    known = {
        "zero_optimization": {"reduce_bucket_size": 1000},
        "wall_clock_breakdown": False,
        "communication_data_type": "fp32",
    }
    known |= {
        "tensorboard": {"enabled": False},
        "flops_profiler": {"enabled": False},
        "steps_per_print": 100,
        "aio": {"thread_count": 1},
    }
    check_block(config(known))


def test_without_deepspeed_there_is_nothing_to_ask(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setitem(sys.modules, "deepspeed.runtime", None)
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.config", None)
    check_block(config({"zero_optimisation": {}}))
