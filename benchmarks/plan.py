"""Activations: what `titans-pretrain plan` says of a layout against what its processes (gloo) hold.

    python -m benchmarks.plan                           # about five minutes on 2 idle cores
    python -m benchmarks.plan --json plan.json --strict

Every layout has its own processes. Measured are the bytes of all tensors that a step makes, from its first forward to its last
backward pass, at the moment when most of them are alive (commands/dry_run.py's LiveBytes, one storage counted once): not the
resident set, in which the allocator's own has its part. Gradients are there before the step, and those that a walk over
segments collects are taken off: plan counts both among the gradients. Of a pipeline every rank is shown that differs.
"""

import json

import torch
import torch.distributed as dist

from benchmarks.common import Bar, argument_parser, describe_setup, finish, run_point
from titans_pretrain.evaluation.figures import markdown_table

MODULE = "benchmarks.plan"
# Name: processes, and what differs from 512 tokens of one row and mag.
LAYOUTS = {
    "one process": (1, {}),
    "transformer": (1, {"model.variant": "transformer", "model.window": None}),
    "mac, two rows": (1, {"model.variant": "mac", "train.micro_batch": 2}),
    "bf16": (1, {"train.precision": "bf16"}),
    "large vocabulary": (1, {"model.vocab_size": 8192, "model.layers": 2, "train.recompute": "block"}),
    "recompute block": (1, {"train.recompute": "block"}),
    "recompute segment, k=4": (1, {"train.recompute": "segment", "parallel.segments_per_rank": 4}),
    "segments, k=4": (1, {"parallel.segments_per_rank": 4}),
    "bf16, recompute block, k=4": (
        1,
        {"train.precision": "bf16", "train.recompute": "block", "parallel.segments_per_rank": 4},
    ),
    "tp 2": (2, {"parallel.tp": 2}),
    "tp 2, bf16": (2, {"parallel.tp": 2, "train.precision": "bf16"}),
    "tp 2, sequence parallel, mal": (
        2,
        {"parallel.tp": 2, "parallel.sequence_parallel": True, "model.variant": "mal"},
    ),
    "tp 2, hidden": (2, {"parallel.tp": 2, "parallel.memory_split": "hidden"}),
    "cp 2, k=2": (2, {"parallel.cp": 2, "parallel.segments_per_rank": 2}),
    "cp 2, recompute block, 2 in flight": (
        2,
        {"parallel.cp": 2, "train.recompute": "block", "parallel.inflight": 2, "train.global_batch": 4},
    ),
    "cp 2, recompute segment, lmm": (
        2,
        {
            "parallel.cp": 2,
            "parallel.segments_per_rank": 2,
            "train.recompute": "segment",
            "model.variant": "lmm",
        },
    ),
    "pp 2": (2, {"parallel.pp": 2, "train.global_batch": 4}),
    "pp 2, recompute block": (2, {"parallel.pp": 2, "train.global_batch": 4, "train.recompute": "block"}),
    "pp 2, interleaved": (
        2,
        {
            "parallel.pp": 2,
            "train.global_batch": 4,
            "parallel.pipeline_schedule": "interleaved",
            "parallel.stages_per_rank": 2,
        },
    ),
    "ZeRO 1, bf16": (2, {"parallel.zero_stage": 1, "train.precision": "bf16", "train.global_batch": 2}),
    "tp 2, cp 2": (4, {"parallel.tp": 2, "parallel.cp": 2, "parallel.segments_per_rank": 2}),
    "tp 2, pp 2": (4, {"parallel.tp": 2, "parallel.pp": 2, "train.global_batch": 4}),
}


def layout_config(changes: dict):
    """changes: by dotted key."""
    from titans_pretrain.config.load import from_dict

    values = {
        "model": {
            "variant": "mag", "dim": 64, "layers": 4, "heads": 4, "vocab_size": 512, "window": 128, "persistent_tokens": 4,
            "memory": {"heads": 2, "chunk_size": 32, "expansion": 2.0}, "mac": {"segment": 128},
        },
        "data": {"seq_len": 512},
        "train": {"micro_batch": 1, "global_batch": 1},
        "parallel": {},
    }  # fmt: skip
    for key, value in changes.items():
        group, name = key.split(".")
        values[group][name] = value
    values["train"]["global_batch"] = max(values["train"]["global_batch"], values["train"]["micro_batch"])
    return from_dict(values)


def measure(changes: dict) -> dict:
    """On one rank: its place in the pipeline, and bytes of its activations at most."""
    from titans_pretrain.commands.dry_run import LiveBytes
    from titans_pretrain.data.reader import Batch, context_columns
    from titans_pretrain.models import build_model
    from titans_pretrain.parallel.apply import build_engine
    from titans_pretrain.parallel.layout import needs_segments
    from titans_pretrain.parallel.mesh import build_mesh, leave_mesh

    config = layout_config(changes)
    p, tokens = config.parallel, config.data.seq_len
    mesh = build_mesh(config, torch.device("cpu"))
    with torch.device("meta"):
        model = build_model(config.model)
    engine = build_engine(config, model, mesh)
    try:
        columns = torch.cat(
            [
                torch.arange(r.start, r.stop)
                for r in context_columns(tokens, mesh.context.rank, p.cp, p.segments_per_rank)
            ]
        ).expand(config.train.micro_batch, -1)
        ids = columns * 7 % config.model.vocab_size
        batches = [Batch(ids, ids.roll(-1, 1), columns)] * engine.micro_batches
        engine.count(batches)
        collected = 0
        for parameter in engine.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            collected += parameter.nbytes * needs_segments(config)
        with LiveBytes() as live:
            engine.forward_backward(batches, tokens)
        return {"pipeline_rank": mesh.pipeline.rank, "bytes": live.peak - collected}
    finally:
        engine = model = None
        leave_mesh()


def compare(world: int, changes: dict, ranks: list[dict]) -> list[tuple[int, float, float]]:
    """(pipeline rank, bytes planned, bytes measured), of the rank that holds most of those at one place in the pipeline."""
    from titans_pretrain.commands.layout import build_layout

    layout = build_layout(layout_config(changes), world)
    return [
        (place, layout.activations(place), max(r["bytes"] for r in ranks if r["pipeline_rank"] == place))
        for place in sorted({r["pipeline_rank"] for r in ranks})
    ]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--point", type=json.loads, help="measure this layout only, in these processes")
    args = parser.parse_args()
    if args.point is not None:
        from titans_pretrain.parallel.launch import leave_processes

        torch.set_num_threads(1)
        found = [measure(args.point)]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, found[0])
            found = everyone if dist.get_rank() == 0 else None
        leave_processes()
        if found:
            print(json.dumps({"ranks": found}), flush=True)
        return
    setup = describe_setup(1, "deepspeed", "megatron-core")
    print("\n".join(f"{name}: {value}" for name, value in setup.items()) + "\n")
    rows, points, worst = [], [], 0.0
    for name in args.only:
        world, changes = LAYOUTS[name]
        ranks = run_point(MODULE, changes, processes=world)["ranks"]
        for place, planned, measured in compare(world, changes, ranks):
            where = f", rank {place}" if changes.get("parallel.pp") else ""
            rows.append(
                [name + where, f"{planned / 2**20:.2f}", f"{measured / 2**20:.2f}", f"{planned / measured:.3f}"]
            )
            points.append({"layout": name, "rank": place, "planned": planned, "measured": measured})
            worst = max(worst, abs(planned / measured - 1))
    print(markdown_table(["layout", "planned, MiB", "measured, MiB", "planned / measured"], rows))
    finish(args, setup, points, [Bar("largest difference of a plan", worst, 0.1, "of what was measured", False)])


if __name__ == "__main__":
    main()
