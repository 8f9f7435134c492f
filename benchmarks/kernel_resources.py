"""What the memory scan's Triton kernels use of a GPU: registers, spills, shared memory, tensor-core instructions.

Every row of the table of launches is compiled as the scan would launch it, in bfloat16, with residual_norm, forgetting to the initial
weights and resets. No GPU is needed. benchmarks/results/kernel_resources.md holds the figures; a test compares some with them.

    python -m benchmarks.kernel_resources                        # sm_90, all rows, a few minutes
    python -m benchmarks.kernel_resources --others               # what else a user may run: does it compile?
    python -m benchmarks.kernel_resources --only 1-64 --arch 80 90 100
    pip install --target DIR triton==3.6.0 && python -m benchmarks.kernel_resources --triton DIR
"""

import argparse
import os
import sys
from dataclasses import asdict, dataclass

from benchmarks.common import Bar, argument_parser, finish
from titans_pretrain.evaluation.figures import markdown_table

# Bytes of shared memory that a program can have, by architecture.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Shape:
    """depth, head size, rows of the last matrix by head size, chunk; the dtype of q, k and v; gates, one or one for each layer.

    plain: without what the fullest programs have, residual_norm, forgetting to the initial weights and resets
    tokens: of the call; None: two chunks
    """

    depth: int
    dim: int
    expansion: int
    chunk: int
    dtype: str = "bf16"
    gates: int = 1
    plain: bool = False
    tokens: int | None = None

    def __str__(self) -> str:
        name = f"{self.depth}-{self.dim}-{self.expansion}-{self.chunk}"
        return name + f"-{self.dtype}" * (self.dtype != "bf16") + "-gates" * (self.gates > 1) + "-plain" * self.plain


SHAPES = [
    *(Shape(1, 64, 1, chunk) for chunk in (16, 64)),
    Shape(1, 128, 1, 64),
    *(Shape(2, 64, expansion, chunk) for expansion, chunk in ((1, 64), (4, 16), (4, 64))),
    Shape(2, 128, 4, 64),
]
# What else a user may run, and where: each value of a kernel's constants, dtypes and architectures in some row.
OTHERS = [
    (Shape(1, 64, 1, 32, "fp32"), 90),
    (Shape(1, 64, 1, 128, "fp16", plain=True), 90),
    (Shape(1, 128, 1, 128, "fp16"), 90),
    (Shape(2, 64, 1, 16, "fp32", 2), 90),
    (Shape(2, 64, 2, 32, "fp16", 2), 90),
    (Shape(2, 64, 4, 128, "fp32"), 90),
    (Shape(2, 64, 4, 32, "bf16", 2, plain=True), 90),
    (Shape(2, 128, 1, 32, "fp16"), 90),
    (Shape(2, 128, 2, 16, "bf16", 2), 90),
    *((Shape(*shape), arch) for arch in (80, 100) for shape in ((1, 64, 1, 64), (2, 64, 4, 64), (2, 128, 4, 64))),
    (Shape(1, 128, 1, 16, "fp32"), 80),
    (Shape(2, 64, 2, 32, "fp16", 2), 80),
    (Shape(2, 64, 1, 16, "fp32", 2), 100),
]


def launches(shape: Shape) -> list:
    """Every kernel of a call of the scan, forward and backward, of a step and of a read, each once: of those that differ in what they
    leave out, the fullest."""
    import torch

    from benchmarks.compiled import recorded
    from titans_pretrain.kernels.memory_scan.chunked.walk import States
    from titans_pretrain.kernels.memory_scan.triton import step
    from titans_pretrain.kernels.memory_scan.triton.backward import backward
    from titans_pretrain.kernels.memory_scan.triton.call import Call, Tokens
    from titans_pretrain.kernels.memory_scan.triton.forward import forward

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[shape.dtype]

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    def tokens(count: int) -> Tokens:
        qkv = (empty(1, count, 1, shape.dim, dtype=dtype) for _ in range(3))
        return Tokens(*qkv, *(empty(1, count, 1, shape.gates) for _ in range(3)))

    full = not shape.plain
    dim, hidden = shape.dim, shape.dim * shape.expansion
    weights = tuple(empty(1, 1, *size) for size in [(dim, hidden), (hidden, dim)][-shape.depth :])
    states = States(weights, weights, None, *((weights, weights) if full else (None, None)))
    x = tokens(shape.tokens or 2 * shape.chunk)
    call = Call.of(x, weights, 0, shape.chunk, full, float(full), full, full, None)
    reset = empty(1, call.chunks, dtype=torch.bool) if full else None
    with recorded() as found:
        results = forward(call, x, states, reset, True)
        after = States(weights, weights, weights if call.ends_half else None, None, None)
        backward(call, x, states, reset, results, x.q, after)
        step.step(tokens(1), weights, weights, weights, weights if full else (), full, float(full))
        for count in (1, 64):
            step.read(tokens(count).q, weights, full)
    fullest = {}
    for launch in found:
        known = launch.constants[-1] if launch.name == "walk" else None  # with the deltas known it is another program
        key = {"walk": "walk" + "_again" * bool(known), "network": f"network_{launch.constant('BT')}"}.get(
            launch.name, launch.name
        )
        if key not in fullest or sum(launch.constants) > sum(fullest[key].constants):
            fullest[key] = launch
    return list(fullest.items())


def selected(only: list[str], others: bool, archs: list[int]) -> list[tuple[Shape, str, object, int]]:
    """Shapes, names, launches and architectures. only: those whose "shape:name" starts with one of it; what is equal once."""
    found, seen = [], set()
    for shape, arch in OTHERS if others else [(shape, arch) for shape in SHAPES for arch in archs]:
        for name, launch in launches(shape):
            if (launch, arch) not in seen and (not only or any(f"{shape}:{name}".startswith(o) for o in only)):
                seen.add((launch, arch))
                found.append((shape, name, launch, arch))
    return found


def parser() -> argparse.ArgumentParser:
    made = argument_parser(__doc__)
    made.add_argument(
        "--only", nargs="+", default=[], metavar="SHAPE[:KERNEL]", help="depth-dim-expansion-chunk, or its start"
    )
    made.add_argument("--arch", nargs="+", type=int, default=[90], help="80 for sm_80, ...")
    made.add_argument(
        "--others",
        action="store_true",
        help="other shapes, dtypes and architectures: whether they compile, and what they use",
    )
    made.add_argument("--triton", metavar="DIR", help="where another version is installed (pip install --target DIR)")
    return made


def main() -> None:
    args = parser().parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    if args.triton:
        sys.path.insert(0, args.triton)
    import triton

    from benchmarks.compiled import compile_launch, ptxas_version

    setup = {"triton": triton.__version__, "ptxas": ptxas_version(args.arch[0])}
    print("\n".join(f"{name}: {value}" for name, value in setup.items()) + "\n", flush=True)
    points = []
    for shape, name, launch, arch in selected(args.only, args.others, args.arch):
        point = {"kernel": name, "row": str(shape), "arch": arch, "warps": launch.warps, "hidden": launch.hidden}
        try:
            point |= asdict(compile_launch(launch, arch))
        except Exception as e:  # whatever the compiler raises is the finding
            point["failed"] = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        points.append(point)
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    header = [
        "kernel",
        "row",
        "sm",
        "hidden",
        "warps",
        "registers",
        "spilled B",
        "shared KiB",
        "wgmma",
        "mma",
        "miscompiled",
    ]
    print(markdown_table(header, [_cells(p) for p in points if "failed" not in p]))
    for p in points:
        if "failed" in p:
            print(f"\n{p['kernel']} of {p['row']} on sm_{p['arch']} does not compile: {p['failed']}")
    finish(args, setup, points, bars(points))


def _cells(p: dict) -> list[str]:
    shared = f"{p['shared'] / 1024:.1f}"
    rest = [p["registers"], p["spilled"], shared, p["wgmma"], p["mma"], p["miscompiled"]]
    return [p["kernel"], p["row"], *map(str, (p["arch"], p["hidden"], p["warps"], *rest))]


def bars(points: list[dict]) -> list[Bar]:
    """Those whose kernels were compiled; spills are of sm_90 and the rows of SHAPES."""
    rows = set(map(str, SHAPES))
    compiled = [p for p in points if "failed" not in p]
    hopper = [p for p in compiled if p["arch"] == 90 and p["row"] in rows]

    def most(what: str, among: list[dict]) -> float | None:
        return max((p[what] for p in among), default=None)

    def spilled(row: str, *kernels: str) -> float | None:
        return most(
            "spilled", [p for p in hopper if p["row"].startswith(row) and (not kernels or p["kernel"] in kernels)]
        )

    shared = max((p["shared"] / SHARED[p["arch"]] for p in compiled if p["arch"] in SHARED), default=None)
    wanted = [
        ("kernels that do not compile", len(points) - len(compiled), 0, ""),
        (
            "operands of the form miscompiled on Hopper",
            most("miscompiled", [p for p in compiled if p["arch"] == 90]),
            0,
            "",
        ),
        ("shared memory, of what a program can have", shared, 1, ""),
        ("spilled, depth 1", spilled("1"), 0, "B"),
        ("spilled, depth 2, state", spilled("2", "exchange", "walk", "walk_again"), 280, "B"),
        ("spilled, depth 2, read", spilled("2", "read"), 64, "B"),
    ]
    return [Bar(name, value, limit, unit, at_least=False) for name, value, limit, unit in wanted if value is not None]


if __name__ == "__main__":
    main()
