"""Two million tokens in one sequence over 4 context-parallel processes of one machine.

  python -m benchmarks.long_context                    # half an hour on 2 idle cores
  python -m benchmarks.long_context --only needle --quick
  python -m benchmarks.long_context --json long_context.json --strict

step     configs/longcontext/2m-cpu.yaml, through the public commands, on the sources of Python's own library: two optimizer
         steps; seconds of the slower one, and the sum of the processes' peak memory
needle   the gradient that a loss on the last 256 tokens sends to the embedding of a token that stands once, far before them: it
         can come through the states alone. Two layers of memory with forgetting near zero, float64. At a length where one
         process can read the sequence plainly, its value is compared
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.common import GIB, Bar, parts_parser, run_parts, run_point
from titans_pretrain.evaluation.figures import markdown_table

ROOT = Path(__file__).parents[1]
CONFIG = "configs/longcontext/2m-cpu.yaml"
MODULE = "benchmarks.long_context"
NEEDLE = 319  # an id that stands nowhere else


def measure(point: dict) -> dict | None:
    """The needle's gradient, its largest entry, in this layout; the first process returns it."""
    from titans_pretrain.config.load import from_dict
    from titans_pretrain.data.reader import Batch, context_columns
    from titans_pretrain.models import build_model
    from titans_pretrain.parallel.apply import build_engine
    from titans_pretrain.parallel.mesh import build_mesh

    torch.set_num_threads(1)
    tokens, world = point["tokens"], int(os.environ.get("WORLD_SIZE", 1))
    memory = {"heads": 2, "expansion": 2.0, "chunk_size": 64, "max_lr": 0.002}
    config = from_dict(
        {
            "model": {
                "variant": "lmm", "dim": 32, "layers": 2, "vocab_size": NEEDLE + 1, "tie_embeddings": False, "persistent_tokens": 0,
                "memory": memory,
            },
            "data": {"seq_len": tokens, "reset_documents": False},
            "train": {"micro_batch": 1, "global_batch": 1, "recompute": "none" if world == 1 else "segment"},
            "parallel": {} if world == 1 else {"cp": world, "segments_per_rank": point["segments"]},
        }
    )  # fmt: skip
    mesh = build_mesh(config, torch.device("cpu"))
    torch.manual_seed(0)
    model = build_model(config.model).double()
    for layer in model.layers:
        # alpha about 1e-6: half of the memory is left after 800K tokens
        torch.nn.init.constant_(layer.memory.forget_proj.bias, -14.0)
    engine = build_engine(config, model, mesh)
    row = torch.randint(0, NEEDLE, (1, tokens), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(row, -100)
    labels[:, -256:] = row[:, -256:].roll(-1, 1)
    row[:, tokens - 256 - point["distance"]] = NEEDLE
    p = config.parallel
    columns = torch.cat(
        [torch.arange(r.start, r.stop) for r in context_columns(tokens, mesh.context.rank, p.cp, p.segments_per_rank)]
    )
    start = time.perf_counter()
    loss = float(engine.forward_backward([Batch(row[:, columns], labels[:, columns], columns[None])], 256))
    if world > 1:
        engine.reduce_gradients()
    gradient = dict(engine.model.named_parameters())["embed_tokens.weight"].grad[NEEDLE]
    found = {"loss": loss, "gradient": gradient.tolist(), "seconds": time.perf_counter() - start}
    return None if world > 1 and dist.get_rank() else found


def needle(args) -> tuple[list[dict], list[Bar]]:
    short, long = (4096, 8192) if args.quick else (16384, 2097152)
    cases = [(1, short, short // 2), (4, short, short // 2)]
    cases += [(4, long, int(long * share)) for share in ((0.9,) if args.quick else (0.06, 0.5, 0.906))]
    points, rows = [], []
    for processes, tokens, distance in cases:
        print(f"needle: {processes} processes, {tokens:,} tokens, distance {distance:,}", file=sys.stderr)
        segments = max(1, tokens // 4 // 32768)
        point = {"tokens": tokens, "distance": distance, "segments": segments}
        found = run_point(MODULE, point, processes=processes)
        points.append(point | {"processes": processes} | found)
        largest = max(map(abs, found["gradient"]))
        rows.append([f"{processes}", f"{tokens:,}", f"{distance:,}", f"{largest:.3e}", f"{found['seconds']:.0f}"])
    print(markdown_table(["processes", "tokens", "distance", "gradient", "seconds"], rows) + "\n")
    plain, ring = (torch.tensor(p["gradient"], dtype=torch.float64) for p in points[:2])
    off = float((ring - plain).abs().max() / plain.abs().max())
    farthest = max(map(abs, points[-1]["gradient"]))
    return points, [
        Bar(f"needle at {short:,} tokens, 4 processes against one, relative", off, 1e-9, "", at_least=False),
        Bar(f"needle's gradient over a distance of {points[-1]['distance']:,}", farthest, sys.float_info.min, ""),
    ]


def step(args) -> tuple[list[dict], list[Bar]]:
    with tempfile.TemporaryDirectory() as folder:
        data, run_dir = Path(folder) / "data", Path(folder) / "run"
        library = sysconfig.get_path("stdlib")
        tokenize = ["-m", "titans_pretrain.data_prep", "tokenize", library, "--suffix", ".py", "--tokenizer", "byte"]
        _run(*tokenize, "--out", data, "--skip-bad-records", "--workers", "2")
        sizes = ["data.seq_len=16384", "parallel.segments_per_rank=2"] if args.quick else []
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
        train = ["-m", "titans_pretrain", "train", CONFIG, f"data.path={data}", f"run.dir={run_dir}"]
        process = _start(*launch, *train, *sizes)
        peaks: dict[str, int] = {}
        while process.poll() is None:
            for pid in _children(process.pid):
                peaks[pid] = max(peaks.get(pid, 0), _peak(pid))
            time.sleep(1)
        if process.returncode:
            raise RuntimeError(f"training ended with {process.returncode}")
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    before = [0, *(line["tokens"] for line in lines)]
    seconds = [(line["tokens"] - b) / line["tokens_per_second"] for line, b in zip(lines, before, strict=False)]
    total = sum(peaks.values()) / GIB
    rows = [
        [f"{line['step']}", f"{s:.0f}", f"{line['loss']:.4f}", f"{line['grad_norm']:.2f}"]
        for line, s in zip(lines, seconds)
    ]
    print(markdown_table(["step", "seconds", "loss", "gradient norm"], rows) + "\n")
    print(f"peak memory of each process, GiB: {', '.join(f'{p / GIB:.2f}' for p in peaks.values())}\n")
    return [{"lines": lines, "peak_gib": total}], [
        Bar("a step of 2,097,152 tokens", max(seconds) / 60, 20, "minutes", at_least=False),
        Bar("peak memory of the 4 processes together", total, 14, "GiB", at_least=False),
    ]


def _run(*arguments) -> None:
    if _start(*arguments).wait():
        raise RuntimeError(f"{' '.join(map(str, arguments))} failed")


def _start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def _children(pid: int) -> list[str]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return found.read_text().split() if found.exists() else []


def _peak(pid: str) -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:  # it has just ended
        return 0
    return int(found[1]) << 10 if found else 0


PARTS = {f.__name__: f for f in (step, needle)}


def main() -> None:
    run_parts(parts_parser(__doc__, PARTS).parse_args(), PARTS, measure)


if __name__ == "__main__":
    main()
