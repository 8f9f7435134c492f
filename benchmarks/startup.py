"""Starting a large model: what a rank of many does before the first step, without the others being there.

    python -m benchmarks.startup                                   # the layouts of the results
    python -m benchmarks.startup --pretend 1024 parallel.tp=8 parallel.pp=4 parallel.cp=4 --rank 777     # one of them

One process stands for a rank of so many; torch's fake process group takes its messages. It makes the mesh, builds the model on
the meta device and keeps its part of it, all as `titans-pretrain train` does, with every weight left without memory. Counted
are the calls that make process groups, the bytes of tensors with memory, and the parameters that the rank has.
"""

import os
import re
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from benchmarks.common import Bar, argument_parser, describe_setup, finish
from titans_pretrain.evaluation.figures import markdown_table

MODULE = "benchmarks.startup"
CONFIG = "configs/70b-mag.yaml"
LAYOUTS = [
    (8, ["parallel.tp=8"]),
    (512, ["parallel.tp=8", "parallel.pp=4"]),
    (1024, ["parallel.tp=8", "parallel.pp=4", "parallel.cp=4"]),
    (1024, ["parallel.cp=1024", "data.seq_len=4194304"]),
    (4096, ["parallel.tp=8", "parallel.pp=4", "parallel.cp=4"]),
]
MOST_GROUPS = 10


def start(world: int, rank: int, overrides: list[str]) -> dict[str, float]:
    """In a process of its own."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from titans_pretrain.commands.dry_run import LiveBytes
    from titans_pretrain.config import load_config
    from titans_pretrain.models import build_model
    from titans_pretrain.parallel.apply import build_engine
    from titans_pretrain.parallel.mesh import build_mesh

    config = load_config(CONFIG, ["data.seq_len=65536", f"train.global_batch={max(1024, world)}", *overrides])
    os.environ["WORLD_SIZE"] = str(world)
    calls, new_group = [], dist.new_group

    def counted(*args, **options):
        calls.append(args)
        return new_group(*args, **options)

    class RealBytes(LiveBytes):
        def meet(self, x: torch.Tensor, made_here: bool) -> None:
            if not x.is_meta:
                super().meet(x, made_here)

    dist.new_group = counted
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    begin = time.perf_counter()
    with RealBytes() as live:
        mesh = build_mesh(config, torch.device("meta"))
        groups = time.perf_counter() - begin
        with torch.device("meta"):
            model = build_model(config.model)
        total = sum(p.numel() for p in model.parameters())
        engine = build_engine(config, model, mesh)
    return {
        "groups made": len(calls),
        "seconds for the groups": round(groups, 1),
        "seconds in all": round(time.perf_counter() - begin, 1),
        "bytes allocated": live.peak,
        "parameters": total,
        "parameters of the rank": sum(p.numel() for p in engine.model.parameters()),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--pretend", type=int, metavar="N", help="one layout only, of so many processes")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    if args.pretend:
        for name, value in start(args.pretend, args.rank, args.overrides).items():
            print(f"{name}: {value}")
        return
    setup = describe_setup(1, "megatron-core")
    print("\n".join(f"{name}: {value}" for name, value in setup.items()) + "\n")
    points, rows = [], []
    for world, overrides in LAYOUTS:
        command = [sys.executable, "-m", MODULE, "--pretend", str(world), *overrides]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {name: float(value) for name, value in re.findall(r"^(.+): (.+)$", text, re.MULTILINE)}
        points.append({"processes": world, "overrides": overrides, **found})
        rows.append(
            [
                f"{world:,}: {' '.join(o.removeprefix('parallel.') for o in overrides)}",
                *(f"{v:,g}" for v in found.values()),
            ]
        )
    print(markdown_table(["processes", *list(points[0])[2:]], rows))
    most, memory = (max(p[name] for p in points) for name in ("groups made", "bytes allocated"))
    bars = [
        Bar("groups that a rank makes", most, MOST_GROUPS, "", at_least=False),
        Bar("memory of tensors", memory / 2**20, 1, "MiB", at_least=False),
    ]
    finish(args, setup, points, bars)


if __name__ == "__main__":
    main()
