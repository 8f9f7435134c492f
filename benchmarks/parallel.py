"""Training on several processes of one machine (gloo): traffic, idle time, memory and speed of each way to spread the work.

    python -m benchmarks.parallel                              # about half an hour on 2 idle cores
    python -m benchmarks.parallel --only payload tensor        # these parts
    python -m benchmarks.parallel --trace ring.json            # the ring's timeline, for chrome://tracing or Perfetto
    python -m benchmarks.parallel --json parallel.json --strict

Every point has its own processes, one thread each. A model of random weights reads random tokens: one forward and backward pass
after a warm-up. Memory is the peak of the resident set above what it was with the model built, of the rank that has most.

  payload   bytes a context-parallel rank sends per layer and boundary, at two lengths; collectives inside the layer loop
  idle      share of the ranks' time in which they wait, against (P - 1) / (m k L + P - 1)
  tensor    bytes of collectives in a step against Megatron-LM's formula: per layer 4 sums of [B, T, dim], 2 more around them
  memory    activations of one process and of 4 context-parallel ones
  segments  peak memory of one process at two lengths, sequences in segments of one size that are recomputed
  zero      bytes of parameters, masters and moments per rank, against DeepSpeed's formula
  speed     a ring of 2 processes on a core each against one process on one core
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.common import GIB, Bar, parts_parser, reset_peak, resident_bytes, run_parts, run_point
from titans_pretrain.evaluation.figures import markdown_table

COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter", "reduce_scatter_tensor",
    "broadcast", "all_to_all", "all_to_all_single", "barrier",
)  # fmt: skip
MODULE = "benchmarks.parallel"


def build(point: dict):
    """The engine of this process and a batch of its columns."""
    from titans_pretrain.config.load import from_dict
    from titans_pretrain.data.reader import Batch, context_columns
    from titans_pretrain.models import build_model
    from titans_pretrain.parallel.apply import build_engine
    from titans_pretrain.parallel.mesh import build_mesh

    tokens = point["tokens"]
    config = from_dict(
        {
            "model": {
                "variant": point.get("variant", "mag"),
                "dim": point.get("dim", 64),
                "layers": point["layers"],
                "heads": 2,
                "vocab_size": 320,
                "window": 256,
                "persistent_tokens": 4,
                "memory": {"heads": 2, "expansion": 2.0, "chunk_size": 64, "max_lr": 0.002},
            },
            "data": {"seq_len": tokens, "reset_documents": False},
            "train": {
                "micro_batch": 1,
                "global_batch": point.get("rows", 1),
                "recompute": point.get("recompute", "none"),
            },
            "parallel": point.get("parallel", {}),
        }
    )
    mesh = build_mesh(config, torch.device("cpu"))
    torch.manual_seed(0)
    engine = build_engine(config, build_model(config.model), mesh)
    p = config.parallel
    columns = torch.cat(
        [torch.arange(r.start, r.stop) for r in context_columns(tokens, mesh.context.rank, p.cp, p.segments_per_rank)]
    )
    row = torch.randint(0, 320, (1, tokens), generator=torch.Generator().manual_seed(1))
    batch = Batch(row[:, columns], row.roll(-1, 1)[:, columns], columns[None])
    return engine, mesh, batch


def measure(point: dict) -> dict | None:
    """One point, on every process of it; the first one returns the figures."""
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if point.get("pin"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    engine, mesh, batch = build(point)
    found = {"zero": measure_zero, "step": measure_step}[point.get("kind", "step")](engine, mesh, batch, point)
    everyone = [found]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, found)
    if rank:
        return None
    return {"point": point, "ranks": everyone}


def measure_step(engine, mesh, batch, point: dict) -> dict:
    from titans_pretrain.parallel.timeline import Timeline

    batches = [batch] * point.get("rows", 1)
    targets = point["tokens"] * len(batches)
    for _ in range(point.get("warm_up", 1)):
        engine.forward_backward(batches, targets)
        engine.model.zero_grad()
    segmented = next((m for m in getattr(engine, "modules", []) if hasattr(m, "link")), None)
    if segmented is not None and point.get("timeline"):
        segmented.timeline = Timeline()
    before = getattr(segmented and segmented.link, "traffic", None)
    built = resident_bytes()
    reset_peak()
    if mesh.world > 1:
        dist.barrier()
    seconds = []
    with count_collectives(mesh) as (calls, sent):
        for _ in range(point.get("repeat", 1)):
            start = time.perf_counter()
            engine.forward_backward(batches, targets)
            seconds.append(time.perf_counter() - start)
            engine.model.zero_grad()
    found = {
        "seconds": min(seconds),
        "activations": resident_bytes(peak=True) - built,
        "peak": resident_bytes(peak=True),
    }
    found |= {"collectives": calls, "collective_bytes": sent}
    if before is not None:
        after = segmented.link.traffic
        found["traffic"] = {
            name: [after[name].bytes - before[name].bytes, after[name].messages - before[name].messages]
            for name in after
        }
    if segmented is not None and point.get("timeline"):
        found["timeline"] = segmented.timeline.spans
    return found


def count_collectives(mesh):
    """Number of collective calls, and the bytes of those on the tensor-parallel group, while it is entered. What reports the
    loss after the layer loop (on all ranks) is not counted."""
    calls, sent = [], []
    tensor = mesh.tensor.group

    def counted(name: str, call: Callable):
        def f(*args, **kwargs):
            group = kwargs.get("group", next((a for a in args if isinstance(a, dist.ProcessGroup)), None))
            if group is not None:
                calls.append(name)
                if group is tensor and torch.is_tensor(args[0]):
                    sent.append(args[0].nbytes)
            return call(*args, **kwargs)

        return f

    class Count:
        def __enter__(self):
            self.patches = [mock.patch.object(dist, n, counted(n, getattr(dist, n))) for n in COLLECTIVES]
            for patch in self.patches:
                patch.start()
            return calls, sent

        def __exit__(self, *error):
            for patch in self.patches:
                patch.stop()

    return Count()


def measure_zero(engine, mesh, batch, point: dict) -> dict:
    """Bytes of what stays on a rank between steps, by walking the optimizer."""
    loss = engine.forward_backward([batch], point["tokens"])
    engine.update(1e-4, loss)
    parameters = list(engine.model.parameters())
    total = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    held = sum(p.ds_tensor.nbytes if hasattr(p, "ds_tensor") else p.nbytes for p in parameters)
    optimizer = engine.zero.optimizer.optimizer if engine.zero is not None else engine.optimizer
    moments = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim)
    masters = 0
    if engine.zero is not None:
        from titans_pretrain.checkpoint.optimizer_states import states_of

        masters = sum(t.nbytes for t in states_of(engine.zero).partitions())
    return {"parameters": total, "held": held, "masters": masters, "moments": moments}


def run(part: str, processes: int, **point) -> dict:
    print(f"{part}: {processes} process{'es' * (processes > 1)}, {point['tokens']:,} tokens", file=sys.stderr)
    return run_point(MODULE, point, processes=processes)


def payload(args) -> tuple[list, list]:
    lengths = (1024, 2048) if args.quick else (8192, 65536)
    points = [run("payload", 2, tokens=t, layers=2, parallel={"cp": 2}, warm_up=0) for t in lengths]
    rows, sizes = [], []
    for t, p in zip(lengths, points, strict=True):
        collectives = len(p["ranks"][0]["collectives"])
        states, back = p["ranks"][0]["traffic"]["states"], p["ranks"][1]["traffic"]["gradients"]
        sizes.append((states[0] / states[1], back[0] / back[1]))
        rows.append([f"{t:,}", f"{sizes[-1][0]:,.0f}", f"{sizes[-1][1]:,.0f}", str(collectives)])
    header = ["tokens", "state, bytes per layer and boundary", "gradient, bytes", "collectives"]
    print(markdown_table(header, rows) + "\n")
    growth, calls = sizes[1][0] / sizes[0][0], max(len(r["collectives"]) for p in points for r in p["ranks"])
    return points, [
        Bar("ring payload per layer, longer over shorter sequence", growth, 1.0, "times", at_least=False),
        Bar("collectives in the layer loop", calls, 0, "", at_least=False),
    ]


def idle(args) -> tuple[list, list]:
    from titans_pretrain.parallel.timeline import idle_share, write_chrome_trace

    tokens, layers = (2048, 2) if args.quick else (16384, 8)
    points, rows = [], []
    for k, m in ((1, 1), (2, 1), (4, 1), (1, 4)):
        p = run(
            "idle", 2, tokens=tokens, layers=layers, rows=m, pin=True, timeline=True,
            parallel={"cp": 2, "segments_per_rank": k, "inflight": m},
        )  # fmt: skip
        spans = [r.pop("timeline") for r in p["ranks"]]
        if args.trace:
            write_chrome_trace(Path(args.trace).with_suffix(f".k{k}m{m}.json"), spans)
        rows.append([f"{k}", f"{m}", f"{idle_share(spans):.1%}", f"{1 / (m * k * layers + 1):.1%}"])
        points.append(p | {"idle": idle_share(spans)})
    print(markdown_table(["segments per rank", "in flight", "idle", "(P-1) / (mkL + P-1)"], rows) + "\n")
    return points, []


def tensor(args) -> tuple[list, list]:
    tokens, layers, dim = (512, 2, 64) if args.quick else (4096, 4, 128)
    points, rows, bars = [], [], []
    for variant in ("transformer", "lmm", "mag", "mal"):
        p = run("tensor", 2, tokens=tokens, layers=layers, dim=dim, variant=variant, parallel={"tp": 2})
        # what ends or starts a region: mixer and MLP; mal has two mixers; mag's two read one input, so one backward sum
        sums = {"transformer": 4, "lmm": 4, "mag": 5, "mal": 6}[variant] * layers + 2
        formula = sums * tokens * dim * 4
        large = sum(b for b in p["ranks"][0]["collective_bytes"])
        rows.append([variant, f"{large / 2**20:.2f}", f"{formula / 2**20:.2f}", f"{large / formula:.3f}"])
        bars.append(
            Bar(f"tensor-parallel volume over the formula, {variant}", large / formula, 1.05, "times", at_least=False)
        )
        points.append(p)
    print(markdown_table(["variant", "sent in a step, MiB", "formula, MiB", "ratio"], rows) + "\n")
    return points, bars


def memory(args) -> tuple[list, list]:
    tokens = 8192 if args.quick else 65536
    one = run("memory", 1, tokens=tokens, layers=4, warm_up=0)
    four = run("memory", 4, tokens=tokens, layers=4, parallel={"cp": 4}, warm_up=0)
    most = [max(r["activations"] for r in p["ranks"]) for p in (one, four)]
    rows = [[f"{n}", f"{m / GIB:.2f}"] for n, m in zip((1, 4), most, strict=True)]
    print(markdown_table(["processes", "activations, GiB"], rows) + "\n")
    return [one, four], [
        Bar(f"activations at {tokens:,} tokens, 4 ranks over 1", most[1] / most[0], 0.35, "times", False)
    ]


def segments(args) -> tuple[list, list]:
    size, lengths = (1024, (4096, 8192)) if args.quick else (16384, (131072, 1048576))
    points = [
        run(
            "segments", 1, tokens=t, layers=2, recompute="segment", parallel={"segments_per_rank": t // size}, warm_up=0
        )
        for t in lengths
    ]
    peaks = [p["ranks"][0]["peak"] for p in points]
    rows = [[f"{t:,}", f"{peak / GIB:.3f}"] for t, peak in zip(lengths, peaks, strict=True)]
    print(markdown_table(["tokens", "peak, GiB"], rows) + "\n")
    return points, [
        Bar(f"peak memory, {lengths[1]:,} over {lengths[0]:,} tokens", peaks[1] / peaks[0], 1.1, "times", False)
    ]


def zero(args) -> tuple[list, list]:
    dim, layers = (64, 2) if args.quick else (512, 4)
    points, rows, bars = [], [], []
    for stage in (0, 1, 2, 3):
        p = run("zero", 2, kind="zero", tokens=256, dim=dim, layers=layers, rows=2, parallel={"zero_stage": stage})
        r = p["ranks"][0]
        n = 2 if stage else 1
        # float32: a copy of the weights that ZeRO steps, and two moments, each a share; stage 3 shares the weights as well
        formula = 4 / (n if stage == 3 else 1) + (4 / n if stage else 0) + 8 / n
        found = (r["held"] + r["masters"] + r["moments"]) / r["parameters"]
        rows.append([f"{stage}", f"{r['parameters']:,}", f"{found:.3f}", f"{formula:.3f}"])
        bars.append(
            Bar(f"ZeRO-{stage}, bytes per parameter over the formula", found / formula, 1.02, "times", at_least=False)
        )
        points.append(p)
    print(markdown_table(["ZeRO stage", "parameters", "bytes per parameter and rank", "formula"], rows) + "\n")
    return points, bars


def speed(args) -> tuple[list, list]:
    tokens, layers = (2048, 2) if args.quick else (32768, 8)
    kinds = {"1 rank": (1, {}), "2 ranks, k=1": (2, {"cp": 2}), "2 ranks, k=4": (2, {"cp": 2, "segments_per_rank": 4})}
    best: dict[str, float] = {}
    points = []
    for _ in range(1 if args.quick else 3):
        for name, (processes, layout) in kinds.items():
            p = run("speed", processes, tokens=tokens, layers=layers, parallel=layout, pin=True)
            best[name] = min(best.get(name, 1e9), max(r["seconds"] for r in p["ranks"]))
            points.append(p)
    one, plain, cyclic = best.values()
    rows = [[name, f"{s:.2f}", f"{one / s:.2f}"] for name, s in best.items()]
    print(markdown_table([f"{tokens:,} tokens, {layers} layers", "seconds", "times one rank"], rows) + "\n")
    return points, [
        Bar("2 ranks with a core each, k=4, over one rank", one / cyclic, 1.5, "times"),
        Bar("k=4 over k=1", plain / cyclic, 1.0, "times"),
    ]


PARTS = {f.__name__: f for f in (payload, idle, tensor, memory, segments, zero, speed)}


def main() -> None:
    parser = parts_parser(__doc__, PARTS)
    parser.add_argument("--trace", metavar="FILE", help="write the ring's timelines beside this name")
    run_parts(parser.parse_args(), PARTS, measure)


if __name__ == "__main__":
    main()
