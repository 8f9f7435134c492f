import mmap

import pytest

from benchmarks import common, memory_scan_cpu, train_step_cpu
from titans_pretrain.config import ModelConfig


@pytest.mark.parametrize("variant", ["mac", "transformer"])
def test_a_step_is_split_into_its_parts(variant):
    tokens = 512
    point = train_step_cpu.measure(variant, tokens)
    c = ModelConfig()
    flops, seconds = point["flops"], point["seconds"]
    assert flops["mlp"] == 3 * 2 * tokens * c.layers * 3 * c.dim * c.ffn_dim  # forward, two products backward
    assert flops["loss"] == 3 * 2 * tokens * c.dim * c.vocab_size
    assert flops["optimizer"] == flops["data"] == flops["rest"] == 0
    projections = 3 * 2 * tokens * c.layers * c.dim**2
    assert flops["attention"] > 4 * projections and seconds["attention"] > 0
    if variant == "mac":
        assert (
            flops["memory"] > 6 * projections and seconds["memory"] > 0
        )  # retrieval and five projections, then the scan
    else:
        assert flops["memory"] == seconds["memory"] == 0
    assert all(seconds[part] > 0 for part in ("mlp", "loss", "optimizer", "data", "rest"))


@pytest.mark.parametrize("side", [memory_scan_cpu.OURS, memory_scan_cpu.PEER])
def test_both_sides_of_the_scan_run_at_the_same_shape(side):
    if side == memory_scan_cpu.PEER:
        pytest.importorskip("titans_pytorch")
    point = common.run_point("benchmarks.memory_scan_cpu", {"side": side, "chunk": 16, "tokens": 128})
    assert point["tokens_per_cpu_second"] > 0 and point["peak_gib"] > 0


def touch(mebibytes: int) -> None:
    with mmap.mmap(-1, mebibytes << 20) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1


def test_the_peak_is_that_of_the_measured_stretch():
    touch(64)
    common.reset_peak()
    before = common.resident_bytes()
    touch(32)
    assert 31 << 20 < common.resident_bytes(peak=True) - before < 40 << 20


def test_strict_fails_when_a_bar_is_not_held(tmp_path, capsys):
    bars = [common.Bar("speed", 4.0, 5.0, "times"), common.Bar("memory", 0.5, 1.0, "GiB", at_least=False)]
    args = common.argument_parser("").parse_args(["--json", str(tmp_path / "out.json")])
    common.finish(args, {}, [], bars)
    assert capsys.readouterr().out.split("\n")[1:3] == [
        "speed: 4 times, at least 5: NOT HELD",
        "memory: 0.5 GiB, at most 1: held",
    ]
    assert '"held": false' in (tmp_path / "out.json").read_text()
    args.strict = True
    with pytest.raises(SystemExit, match="1"):
        common.finish(args, {}, [], bars)
