"""Which inner step the memory learns with: how fast it learns, and what the gradient through it does on repetitive rows.

    python -m benchmarks.inner_step --results study.jsonl                # everything; hours on two cores
    python -m benchmarks.inner_step --results study.jsonl --only recall  # a part; points that the file has are not measured again
    python -m benchmarks.inner_step --results study.jsonl --report       # the tables of what the file has, and the bars

gradient  norm of the whole gradient of a fresh model, 4,096 tokens in one row, over that of the transformer on the same row:
          random tokens, one token, two in turn, half random and half one token, and letters with long runs of one
recall    steps until 8 pairs are recalled over 48 to 128 tokens (benchmarks/recall.py), and the gradient afterwards
text      loss on Python's own library, byte by byte, after 2M tokens, and the gradient afterwards

Settings are keys of model.memory; c is `damping`, g `step_coefficient` (none: the plain step).
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sysconfig
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benchmarks.common import Bar, argument_parser, describe_setup, finish
from benchmarks.recall import VOCAB, recall_config, train
from titans_pretrain.evaluation.figures import markdown_table

TOKENS = 4096
SEEDS = range(5)
MEMORIES = ("lmm", "mag", "mal", "mac")
LIMIT = 10.0  # of a gradient's norm over the transformer's
UNDAMPED = {"damping": 0.0, "step": "plain", "max_lr": 0.1}


def setting(c: float, g: float | None, max_lr: float, step: str = "telescoped", **other) -> dict:
    how = {"step": "plain"} if g is None else {"step": step, "step_coefficient": float(g)}
    return {"damping": float(c), **how, "max_lr": float(max_lr), **other}


CHOSEN = setting(1.0, 0.7, 3.4, "relative")
TELESCOPED = setting(1.0, 1.2, 1.6)  # the same for values as a fresh model has them


def points() -> Iterator[dict]:
    """All of the study, what decides first."""

    def make(part: str, memory: dict, variant: str = "lmm", seeds=SEEDS, **other) -> Iterator[dict]:
        for seed in seeds:
            yield {"part": part, "variant": variant, "memory": memory, "seed": seed, **other}

    both = (UNDAMPED, CHOSEN)
    yield from make("recall", {}, "transformer")
    for memory in (*both, TELESCOPED):
        yield from make("recall", memory)
    for variant, dtype in itertools.product(("transformer", *MEMORIES), ("float32", "bfloat16")):
        for memory in ({},) if variant == "transformer" else both:
            yield from make("gradient", memory, variant, dtype=dtype)
    for variant in ("transformer", "lmm"):
        for memory in ({},) if variant == "transformer" else both:
            yield from make("text", memory, variant)
    for c, g, max_lr in itertools.product((0, 0.5, 1, 2), (None, 0.8, 1.2, 2.0), (0.1, 0.8, 1.6, 3.2)):
        yield from make("gradient", setting(c, g, max_lr), seeds=range(2), rows=["equal", "half equal"])
    for chunk, depth in itertools.product((1, 16, 64), (1, 2, 3)):
        for memory in both:
            shape = {"chunk_size": chunk, "depth": depth}
            yield from make("gradient", memory | shape, seeds=range(3), rows=["equal", "period 2"])
    for variant in ("mag", "mal", "mac"):
        yield from make("recall", CHOSEN, variant, seeds=range(2))
    for c, g, max_lr in (
        (1, 1.2, 0.8),
        (1, 1.2, 3.2),
        (1, 2, 1.6),
        (0.5, 1.2, 1.6),
        (2, 1.2, 1.6),
        (2, 1.2, 3.2),
        (1, 0.8, 1.6),
        (1, None, 0.4),
    ):
        yield from make("recall", setting(c, g, max_lr), seeds=range(2))
    for shape in ({"chunk_size": 64}, {"depth": 1}, {"depth": 3}, {"expansion": 1}, {"expansion": 4}):
        yield from make("recall", CHOSEN | shape, seeds=range(2))
    for expansion, depth in ((1, 2), (2, 2), (4, 2), (2, 3)):
        yield from make(
            "recall", CHOSEN | {"expansion": expansion, "depth": depth, "per_layer_gates": True}, seeds=range(2)
        )
    for other in ({"expansion": 1}, {"expansion": 4}, {"per_layer_gates": True}, {"depth": 1}, {"depth": 3}):
        yield from make("text", CHOSEN | other, seeds=range(2))
    for variant in ("mag", "mac"):
        for memory in both:
            yield from make("text", memory, variant, seeds=range(2))
    for memory in both:
        yield from make("recall", memory | {"chunk_size": 1}, seeds=range(1))


def build(point: dict, vocab: int):
    import torch

    from titans_pretrain.models import build_model

    memory = {f"memory.{k}": v for k, v in point["memory"].items()}
    torch.manual_seed(point["seed"])
    return build_model(recall_config(variant=point["variant"], vocab_size=vocab, **memory))


def rows(vocab: int, tokens: int) -> dict:
    """Rows of tokens [1, tokens + 1], by name."""
    import torch

    generator = torch.Generator().manual_seed(0)
    random = torch.randint(vocab, (1, tokens + 1), generator=generator)
    half = random.clone()
    half[:, tokens // 2 :] = 7
    runs = torch.randint(4, (1, tokens + 1), generator=generator)
    for start in range(tokens // 8, tokens, tokens // 4):  # as a genome's unknown stretches
        runs[:, start : start + tokens // 8] = 4
    two = torch.tensor([[7, 9]]).repeat(1, tokens // 2 + 1)[:, : tokens + 1]
    equal = torch.full_like(random, 7)
    return {"random": random, "equal": equal, "period 2": two, "half equal": half, "runs": runs}


def gradient_norms(model, tokens: int, dtype: str = "float32", only=None) -> dict[str, float]:
    """Norm of the gradient of each row's loss with respect to all parameters."""
    import torch

    norms = {}
    for name, row in rows(model.config.vocab_size, tokens).items():
        if only and name not in only:
            continue
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            model(row[:, :-1], labels=row[:, 1:]).loss.backward()
        gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        norms[name] = float(torch.cat(gradients).norm())
    model.zero_grad()
    return norms


def measure_gradient(point: dict, quick: bool) -> dict:
    model = build(point, VOCAB)
    return {"norms": gradient_norms(model, 64 if quick else TOKENS, point.get("dtype", "float32"), point.get("rows"))}


def measure_recall(point: dict, quick: bool) -> dict:
    limit = 3 if quick else 300 if point["variant"] == "transformer" else 800
    model, seen = build(point, VOCAB), []
    for _, accuracy in train(model, limit, seed=point["seed"]):
        seen.append(accuracy)
    learned = seen[-1] > 0.995
    norms = {d: gradient_norms(model, 64 if quick else TOKENS, d) for d in ("float32", "bfloat16")}
    return {"steps": len(seen) if learned else None, "accuracy": seen[-1], "norms": norms}


@cache
def library() -> bytes:
    """Python's own library, 10 MB of it."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    text = b"\n".join(f.read_bytes() for f in files if "site-packages" not in f.parts and "test" not in f.parts)
    return text[:10_000_000]


def measure_text(point: dict, quick: bool) -> dict:
    """Rows of 512 bytes, 8 to a step; the last megabyte is held out."""
    import torch

    length, batch, steps = 512, 8, 3 if quick else 490
    text = torch.frombuffer(bytearray(library()), dtype=torch.uint8)
    learned, held_out = text[:-1_000_000], text[-1_000_000:]
    generator = torch.Generator().manual_seed(point["seed"])

    def draw(source, generator):
        start = torch.randint(len(source) - length - 1, (batch,), generator=generator)
        return torch.stack([source[s : s + length + 1] for s in start.tolist()]).long()

    model = build(point, 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    norms = []
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 50, (steps - step + 1) / 100)
        x = draw(learned, generator)
        optimizer.zero_grad()
        model(x[:, :-1], labels=x[:, 1:]).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
    fixed = torch.Generator().manual_seed(0)
    with torch.no_grad():
        held = [draw(held_out, fixed) for _ in range(1 if quick else 24)]
        loss = sum(float(model(x[:, :-1], labels=x[:, 1:]).loss) for x in held) / len(held)
    after = {d: gradient_norms(model, 64 if quick else TOKENS, d) for d in ("float32", "bfloat16")}
    return {"loss": loss, "largest_norm": max(norms), "norms": after}


MEASURE = {"gradient": measure_gradient, "recall": measure_recall, "text": measure_text}


def key(point: dict) -> str:
    own = {k: v for k, v in point.items() if k not in ("steps", "accuracy", "loss", "largest_norm", "norms", "seconds")}
    return json.dumps(own, sort_keys=True)


def measure(point: dict, quick: bool = False) -> dict:
    import torch

    torch.set_num_threads(1)
    start = time.time()
    return point | MEASURE[point["part"]](point, quick) | {"seconds": round(time.time() - start, 1)}


def describe(memory: dict) -> str:
    if not memory:
        return ""
    g = memory.get("step_coefficient", "none")
    given = ("damping", "step_coefficient", "max_lr", *(() if memory["step"] == "relative" else ("step",)))
    rest = {k: v for k, v in memory.items() if k not in given}
    return f"c {memory['damping']:g}, g {g}, max_lr {memory['max_lr']:g}" + "".join(
        f", {k} {v}" for k, v in rest.items()
    )


def ratios(found: list[dict]) -> Iterator[tuple[dict, str, float]]:
    """(point, dtype, worst ratio over rows) of every point with a memory, against the transformer's of the same part and seed."""

    def norms(point: dict) -> dict[str, dict[str, float]]:
        return {point.get("dtype", "float32"): point["norms"]} if point["part"] == "gradient" else point["norms"]

    baseline: dict[tuple, float] = {}
    for point in found:
        if point["variant"] == "transformer":
            for dtype, by_row in norms(point).items():
                baseline |= {(point["part"], point["seed"], dtype, row): n for row, n in by_row.items()}
    for point in found:
        if point["variant"] == "transformer":
            continue
        for dtype, by_row in norms(point).items():
            pairs = [(n, baseline.get((point["part"], point["seed"], dtype, row))) for row, n in by_row.items()]
            known = [n / base if n == n else float("inf") for n, base in pairs if base]
            if known:
                yield point, dtype, max(known)


def report(found: list[dict]) -> list[Bar]:
    """Prints a table for each part; the bars are the chosen setting's."""
    worst: dict[tuple, float] = {}
    for point, dtype, ratio in ratios(found):
        name = (point["part"], point["variant"], describe(point["memory"]))
        worst[(*name, dtype)] = max(worst.get((*name, dtype), 0.0), ratio)
    groups: dict[tuple, list[dict]] = {}
    for point in found:
        groups.setdefault((point["part"], point["variant"], describe(point["memory"])), []).append(point)
    bars = []
    for part, title in (("gradient", None), ("recall", "steps to recall"), ("text", "loss on text")):
        header = ["variant", "setting", "seeds", *([title] if title else []), "gradient / transformer, fp32", "bf16"]
        table = []
        for (where, variant, memory), group in groups.items():
            if where != part:
                continue
            told = []
            if part == "recall":
                steps = (str(p["steps"] or "never") for p in sorted(group, key=lambda p: p["seed"]))
                told = [" ".join(steps)]
            elif part == "text":
                losses = [p["loss"] for p in group]
                told = [f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"]
            cells = [worst.get((part, variant, memory, d)) for d in ("float32", "bfloat16")]
            seeds = len({p["seed"] for p in group})
            table.append([variant, memory, str(seeds), *told, *("-" if c is None else f"{c:.3g}" for c in cells)])
        if table:
            print(f"\n{part}\n\n" + markdown_table(header, table))
        chosen = [r for (where, _, memory, _), r in worst.items() if where == part and memory == describe(CHOSEN)]
        if chosen:
            bars.append(
                Bar(f"{part}: the chosen step's gradient over the transformer's, worst", max(chosen), LIMIT, "x", False)
            )
    return bars


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--results", type=Path, help="one JSON line per point; read first, then added to")
    parser.add_argument("--only", nargs="+", choices=MEASURE, default=list(MEASURE), metavar="PART")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each (default: 2)")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true", help="a few tiny points: whether it works")
    args = parser.parse_args()
    setup = describe_setup(1)
    print("\n".join(f"{name}: {value}" for name, value in setup.items()))
    found = []
    if args.results and args.results.exists():
        found = [json.loads(line) for line in args.results.read_text().splitlines()]
    if not args.report:
        found += run(args, {key(p) for p in found})
    finish(args, setup, found, report(found))


def run(args: argparse.Namespace, known: set[str]) -> list[dict]:
    from tqdm import tqdm

    left = [p for p in points() if p["part"] in args.only and key(p) not in known]
    if args.quick:
        left = [next(p for p in left if p["part"] == part) for part in args.only]
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        calls = [pool.apply_async(measure, (p, args.quick)) for p in left]
        for call in tqdm(calls, unit="point"):
            found.append(call.get())
            if args.results:
                with args.results.open("a") as f:
                    f.write(json.dumps(found[-1]) + "\n")
    return found


if __name__ == "__main__":
    main()
