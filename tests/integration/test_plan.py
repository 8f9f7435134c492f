"""What `titans-pretrain plan` says, against the model as it is; against running processes: tests/distributed/test_plan_of_layouts.py."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.common import flop_counter
from titans_pretrain import cli
from titans_pretrain.commands import layout as layouts
from titans_pretrain.commands.layout import build_layout, needed_memory, ring_efficiency, state_bytes
from titans_pretrain.commands.plan import flops_per_token, parameters_by_part, plan, run_flops
from titans_pretrain.config import load_config
from titans_pretrain.config.load import from_dict
from titans_pretrain.models import build_model
from titans_pretrain.models.costs import attention_flops, retrieved_flops
from titans_pretrain.parallel.layout import check_layout
from titans_pretrain.parallel.zero_settings import zero_settings
from titans_pretrain.training.optimizer import build_optimizer

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "tiny.yaml"
VARIANTS = {variant: [f"model.variant={variant}"] for variant in ("lmm", "mac", "mag", "mal", "transformer")}
VARIANTS["hybrid"] = [
    "model.pattern=[{memory: {depth: 1}}, {variant: mac, heads: 4}, {variant: transformer, window: null, ffn_dim: 192}]",
    "model.layers=3", "model.kv_heads=1", "model.head_dim=48",
]  # fmt: skip
SMALL = [
    "model.dim=128",
    "model.vocab_size=256",
    "data.seq_len=256",
    "model.persistent_tokens=0",
    "train.micro_batch=1",
    "train.global_batch=1",
]


def planned(capsys, *arguments: str) -> dict[str, str]:
    """The rows of all tables by name."""
    assert cli.main(["plan", *map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition("  ") for line in lines)}


def test_plan_prints_what_the_model_is(data, capsys):
    found = planned(capsys, TINY, f"data.path={data}")
    total = sum(p.numel() for p in build_model(load_config(TINY).model).parameters())
    assert found["total"] == f"{total:,}"
    assert found["micro-batches"] == "2 of 2 rows"
    assert "training tokens: 0.2" in found["data"]  # 20 steps of 512 tokens out of 44,763
    assert not found.keys() & {"processes", "stages", "segments", "state", "ring", "ZeRO"}
    assert planned(capsys, TINY)["data"] == "data.path is not set"


def test_plan_counts_the_steps_of_a_warm_up(data, capsys):
    """Every step by itself: rows, and FLOPs at its length."""
    warm = ["train.global_batch=8", "train.batch_warmup=[[0,2],[3,4],[15,8]]", "data.seq_len_warmup=[[0,32],[4,128]]"]
    config = load_config(TINY, warm)
    rows = [2] * 3 + [4] * 12 + [8] * 5
    flops = [n * 128 * flops_per_token(config, 32 if step < 4 else 128)[1] for step, n in enumerate(rows)]
    found = planned(capsys, TINY, *warm, f"data.path={data}")
    assert found["rows before"] == "2 up to step 3, 4 up to step 15"
    assert found["tokens in a row before"] == "32 up to step 4"
    assert found["micro-batches"] == "4 of 2 rows"
    text = [line.split() for line in plan(config).splitlines() if line.strip().startswith(("tokens  ", "FLOPs  "))]
    assert text[2][1] == f"{sum(rows) * 128:,}" and text[3][1] == f"{sum(flops):.2e}"
    assert f"{sum(rows) * 128 / 44763:.2f} epochs" in found["data"]
    assert run_flops(load_config(TINY, [*warm, "train.steps=3"])) == pytest.approx(sum(flops[:3]))


def test_plan_takes_the_row_length_that_needs_most():
    """Short rows have a memory state each; long ones more of attention's."""
    one = ["train.micro_batch=1", "train.global_batch=1"]
    warm = load_config(TINY, [*one, "data.seq_len_warmup=[[0,16],[4,128]]"])
    alike = [
        load_config(TINY, ["train.micro_batch=8", "train.global_batch=8", "data.seq_len=16"]),
        load_config(TINY, one),
    ]
    parts = [build_layout(config).memory(0) for config in alike]
    assert sum(parts[0].values()) != sum(parts[1].values())
    assert needed_memory(warm, None) == max(parts, key=lambda found: sum(found.values()))


@pytest.mark.parametrize(("variant", "recompute"), [*((variant, "none") for variant in VARIANTS), ("mag", "block")])
def test_plan_counts_flops_as_the_model_has_them(variant, recompute):
    """Within 5 % of torch's counter, which does not see attention's scores: they are taken out on both sides."""
    config = load_config(TINY, [*VARIANTS[variant], f"train.recompute={recompute}", *SMALL])
    model = build_model(config.model)
    model.set_recompute(recompute)
    assert sum(parameters_by_part(model).values()) == sum(p.numel() for p in model.parameters())
    attending = [layer for layer in config.model.layer_configs if layer.has_attention]
    scores = sum(attention_flops(layer, config.data.seq_len) - retrieved_flops(layer) for layer in attending)
    tokens = torch.zeros(1, 256, dtype=torch.int64)
    with torch.no_grad(), flop_counter() as forward:
        model(tokens)
    with flop_counter() as training:
        model(tokens, labels=tokens).loss.backward()
    expected_forward, expected = flops_per_token(config)
    passes = 3 if recompute == "none" else 4
    assert forward.get_total_flops() / 256 == pytest.approx(expected_forward - scores, rel=0.05)
    assert training.get_total_flops() / 256 == pytest.approx(expected - passes * scores, rel=0.05)


@pytest.mark.slow
def test_a_layout_is_shown_with_its_stages_segments_and_traffic(capsys):
    """340M MAG: layers of 16 memories of 64 x 256 x 2 weights, three convolution tails of 3 tokens, a window of 2048, bf16."""
    layout = ["parallel.cp=4", "parallel.pp=2", "parallel.segments_per_rank=2", "parallel.zero_stage=1"]
    options = ["data.seq_len=65536", "train.micro_batch=1", "train.global_batch=8"]
    found = planned(capsys, CONFIGS / "340m-mag.yaml", "--processes", 16, *layout, *options)
    assert found["processes"] == "16: dp 2, cp 4, tp 1, pp 2"
    assert found["micro-batches"] == "4 of 1 rows on each of 2 data-parallel ranks"
    assert found["stages"] == "layers 0-12, 13-23"
    assert found["pipeline"] == "computes at best 80% of the time"
    assert found["segments"] == "8 of 8,192 tokens, 2 on each of 4 context-parallel ranks"
    state = 2 * 16 * (2 * 64 * 256) * 4 + 3 * 3 * 1024 * 2 + 2 * 2047 * 1024 * 2
    assert found["state"] == f"{state:,} bytes per layer and boundary of segments"
    sent = 4 * 13 * 4 * state / 2**20  # micro-batches, layers, states and gradients of two segments each
    assert found["ring"] == f"{sent:,.1f} MiB from a rank in a step; computes at best {26 / 29:.0%} of the time"
    assert found["ZeRO"] == "stage 1 over 8 ranks (dp x cp)"


def test_layers_that_differ_are_shown_with_the_range_of_their_states(capsys):
    """And each with what it costs: the stages' cuts follow."""
    options = [
        "model.layers=4",
        "model.kv_heads=1",
        "model.dim=64",
        "model.memory.heads=2",
        "parallel.segments_per_rank=2",
    ]
    pattern = "model.pattern=[mag, {variant: transformer, window: 9}, {variant: transformer, window: 5}, {variant: transformer, window: 5}]"
    found = planned(capsys, TINY, pattern, *options, "parallel.pp=2")
    memory = 2 * (2 * 2 * (2 * 32 * 128) * 4 + 3 * 3 * 64 * 4)  # rows, weights and surprise, tails of the convolutions
    keys = 2 * 2 * 32 * 4  # rows, keys and values of one head, in float32
    assert found["state"] == f"{4 * keys:,} to {memory + 63 * keys:,} bytes per layer and boundary of segments"
    assert found["stages"] == "layers 0-0, 1-3"
    ring = build_layout(load_config(TINY, [pattern, *options[:-1], "parallel.cp=2"]), 2)
    assert (
        ring.ring_bytes(0, 0) == memory + (63 + 8 + 4 + 4) * keys
    )  # one boundary; gradients return from the other rank


def test_what_mac_retrieves_costs_its_keys_and_values_once_more():
    config = load_config(TINY, [*VARIANTS["hybrid"], *SMALL]).model
    attention = build_model(config).layers[1].attention
    assert retrieved_flops(config.layer(1)) == 2 * (attention.k_proj.weight.numel() + attention.v_proj.weight.numel())
    assert retrieved_flops(config.layer(0)) == 0


@pytest.mark.slow
def test_a_large_model_is_planned_without_being_there():
    """70B on 512 processes: the numbers of the whole in less than 1 GiB."""
    code = (
        "import re, sys; from titans_pretrain import cli; assert cli.main(sys.argv[1:]) == 0; "
        "print('resident', int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)"
    )
    layout = ["parallel.tp=8", "parallel.pp=4", "parallel.zero_stage=1", "parallel.sequence_parallel=true"]
    command = [sys.executable, "-c", code, "plan", str(CONFIGS / "70b-mag.yaml"), "--processes", "512", *layout]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "512: dp 16, cp 1, tp 8, pp 4" in text and "layers 0-16, 17-33, 34-50, 51-67" in text
    total = int(re.search(r"total +([\d,]+)", text)[1].replace(",", ""))
    assert 69e9 < total < 71e9
    assert int(re.search(r"resident (\d+)", text)[1]) < 1024


def test_segments_on_one_process_are_shown_without_a_ring(capsys):
    found = planned(capsys, TINY, "train.recompute=segment", "parallel.segments_per_rank=4", "model.variant=lmm")
    assert found["segments"] == "4 of 32 tokens"
    assert (
        found["state"]
        == f"{2 * (2 * 2 * (2 * 32 * 128) * 4 + 3 * 3 * 64 * 4):,} bytes per layer and boundary of segments"
    )
    assert not found.keys() & {"processes", "ring", "stages"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--processes", "6", "parallel.cp=4"], "6 processes do not divide into"),
        (["--processes", "3"], "must be a multiple of train.micro_batch=2 * 3 data-parallel processes"),
        (["parallel.zero_stage=3", "parallel.cp=2"], "parallel.zero_stage=3 cannot run sequences in segments"),
        (["--processes", "0"], "--processes must be 1 or more, got 0"),
    ],
)
def test_a_layout_that_a_run_refuses_is_refused(capsys, arguments, told):
    assert cli.main(["plan", str(TINY), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_tensor_parallel_ranks_are_planned_without_being_started(capsys):
    pytest.importorskip("megatron.core")
    whole, half = (planned(capsys, TINY, f"parallel.tp={tp}") for tp in (1, 2))
    assert half["total"] == whole["total"]
    assert half["processes"] == "2: dp 1, cp 1, tp 2, pp 1"
    layouts = [build_layout(load_config(TINY, [f"parallel.tp={tp}"])) for tp in (1, 2)]
    assert 0.5 < layouts[1].parameters(0) / layouts[0].parameters(0) < 0.51
    assert not torch.distributed.is_initialized()


def test_tensor_parallelism_without_its_packages_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron", None)
    assert cli.main(["plan", str(TINY), "parallel.tp=2"]) == 2
    assert "pip install 'titans-pretrain[distributed]'" in capsys.readouterr().err


def test_bytes_of_parameters_under_zero():
    """Against the arithmetic of ZeRO (Rajbhandari et al. 2020) with Adam: 2 + 2 + 12 bytes in bf16, 4 + 4 + 8 without ZeRO."""

    def held(stage, precision, *more, matrices=0):
        options = [f"parallel.zero_stage={stage}", f"train.precision={precision}", "train.global_batch=8", *more]
        return list(state_bytes(load_config(TINY, options), 1000, 4, matrices).values())

    assert held(0, "fp32") == held(0, "bf16") == [4000, 4000, 8000]
    assert held(1, "bf16") == [2000, 4000, 3000]  # gradients are summed in float32
    assert held(2, "bf16") == [2000, 500, 3000]
    assert held(3, "bf16") == [500, 500, 3000]
    assert held(3, "fp32") == [1000, 1000, 3000]
    assert held(2, "bf16", "parallel.cp=2") == [2000, 2000 + 250, 1500]  # the walk's sums, and this rank's part
    assert held(0, "fp32", matrices=600) == [4000, 4000, 8000 - 2400]
    assert held(0, "fp32", "train.ema=0.9") == [4000, 4000, 12000]
    assert held(1, "bf16", "train.ema=0.9", matrices=600) == [2000, 4000, (16000 - 2400) / 4]


def test_the_optimizers_state_is_that_of_a_step():
    options = ["train.optimizer=muon", "train.ema=0.9", "model.variant=mac"]
    config = load_config(TINY, options)
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.train)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")
    assert build_layout(config).memory(0)["optimizer"] == held


def test_steps_are_counted_again_where_they_differ_and_else_once(monkeypatch):
    counted = []
    monkeypatch.setattr(layouts, "count_steps", lambda config, model: counted.append(config))
    monkeypatch.setattr(layouts, "one_rank", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(layouts, "_known_steps", {})

    def count(*options: str) -> int:
        assert build_layout(load_config(TINY, options))._steps is None
        return len(counted)

    bf16 = "train.precision=bf16"
    segment = "train.recompute=segment"
    others = [
        [], ["train.micro_batch=1"], ["data.seq_len=256"], ["model.layers=3"], ["parallel.cp=2"], [segment],
        [segment, "parallel.segments_per_rank=2"], [bf16], [bf16, "parallel.zero_stage=1"], ["parallel.tp=2"],
        ["parallel.tp=2", "parallel.memory_split=hidden"], ["parallel.tp=2", "parallel.sequence_parallel=true"],
    ]  # fmt: skip
    for number, options in enumerate(others, 1):
        for same in ([], ["train.lr=1"], ["train.global_batch=64"], ["parallel.inflight=1"]):
            assert count(*options, *same) == number, options
    assert count("train.recompute=block") == count(bf16, "parallel.zero_stage=2") == len(others)


@pytest.mark.slow
def test_less_is_kept_for_the_backward_pass_with_recomputation_and_more_in_a_pipeline():
    def kept(*options, rank=0):
        wide = ["data.seq_len=512", "train.micro_batch=1", "train.global_batch=8", "model.layers=8", "model.dim=32"]
        return build_layout(load_config(TINY, [*wide, *options])).activations(rank)

    plain, block = kept(), kept("train.recompute=block")
    segment = kept("train.recompute=segment", "parallel.segments_per_rank=4")
    assert plain > 3 * block and plain > 2 * segment
    assert kept("parallel.cp=2") == pytest.approx(plain / 2, rel=0.25)
    first, last = (kept("parallel.pp=4", rank=rank) for rank in (0, 3))
    assert 2 * last < first < 4.5 * last  # micro-batches whose backward pass is to come


@pytest.mark.parametrize(
    ("layers", "ranks", "segments", "inflight", "expected"),
    [
        (24, 8, 1, 1, 24 / 31),
        (24, 8, 4, 1, 96 / 103),
        (12, 8, 2, 3, 72 / 79),
        (4, 8, 1, 3, 12 / 19),
        (4, 8, 4, 1, 16 / 35),
    ],
)
def test_ring_efficiency_is_that_of_the_schedule(layers, ranks, segments, inflight, expected):
    """Against the schedule, step by step: each rank takes its segments' layers in order, as soon as what they need is there."""
    assert ring_efficiency(layers, ranks, segments, inflight) == pytest.approx(expected)
    done: dict[tuple[int, int, int], int] = {}
    free = [0] * ranks
    for sequence in range(inflight):
        for segment in range(ranks * segments):
            for layer in range(layers):
                rank = segment % ranks
                free[rank] = max(free[rank], done.get((sequence, segment - 1, layer), 0)) + 1
                done[sequence, segment, layer] = free[rank]
    assert inflight * segments * layers / max(free) == pytest.approx(expected)


def commands(path: Path) -> list[tuple[str, int, list[str]]]:
    """(config, processes, overrides) of every training command in a file; a backslash continues a line."""
    found = []
    for line in re.sub(r"\\\n[# ]*", "", path.read_text()).splitlines():
        if match := re.search(r" (configs/\S+\.yaml)((?: [\w.]+=\S+)*)$", line):
            nodes, tasks, ranks = (
                int(n[1]) if (n := re.search(rf"--{option}=(\d+)", line)) else 1
                for option in ("nodes", "ntasks-per-node", "nproc-per-node")
            )
            found.append((match[1], nodes * tasks * ranks, match[2].split()))
    return found


def test_the_commands_of_the_documentation_fit_their_processes():
    folder = CONFIGS.parent
    found = [*commands(folder / "docs/parallelism.md"), *commands(folder / "slurm/pretrain.sbatch")]
    assert [processes for _, processes, _ in found] == [2, 1, 8, 32, 16, 1, 32]
    for config, processes, overrides in found:
        check_layout(load_config(folder / config, overrides), processes)


def test_the_deepspeed_block_of_the_documentation_is_taken():
    text = (CONFIGS.parent / "docs/parallelism.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    config = from_dict(yaml.safe_load(block))
    assert zero_settings(config, 1)["zero_optimization"]["reduce_bucket_size"] == 200_000_000
