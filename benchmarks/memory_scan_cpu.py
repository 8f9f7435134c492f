"""The neural memory on a CPU: speed and peak memory of this package and of titans-pytorch, side by side.

    python -m benchmarks.memory_scan_cpu                            # a quarter of an hour on one core, most of it theirs
    python -m benchmarks.memory_scan_cpu --lengths 4096 --chunks 16 --rounds 1
    python -m benchmarks.memory_scan_cpu --json scan.json --strict

One layer, forward and backward, float32, one thread: width 256, 4 heads of 64, memory of depth 2 and expansion 2, without
residual norm. titans-pytorch runs with batch_size = chunk_size, so that both take their gradients at the chunk's start. The layers
are not the same function: titans-pytorch takes one step per chunk; ours has momentum, forgetting and a step per token, and
convolutions, l2 norms and an output gate around it.

Every point has its own process: a warm-up, then repetitions; both sides alternate, and the best of all rounds counts. Speed is in
tokens per CPU second. Memory is the peak of the resident set above what it was with the model and the input built. torch may use
huge pages for large blocks, on both sides (THP_MEM_ALLOC_ENABLE=1).
"""

import json
import math
import sys

import torch

from benchmarks.common import (
    GIB,
    Bar,
    argument_parser,
    best_cpu_seconds,
    describe_setup,
    finish,
    flop_counter,
    reset_peak,
    resident_bytes,
    run_point,
)  # fmt: skip
from titans_pretrain.evaluation.figures import markdown_table

DIM, HEADS, DEPTH, EXPANSION, MAX_LR = 256, 4, 2, 2, 0.1
OURS, PEER = "titans-pretrain", "titans-pytorch"
SPEEDUP = {16: 5.0, 64: 3.0}  # chunk -> bar over titans-pytorch at 4K tokens


def build_ours(chunk: int):
    from titans_pretrain.config.model import MemoryConfig
    from titans_pretrain.models.memory import MemoryLayer

    memory = MemoryConfig(
        heads=HEADS,
        depth=DEPTH,
        expansion=EXPANSION,
        chunk_size=chunk,
        residual_norm=False,
        forget_to="zero",  # as theirs
        max_lr=MAX_LR * HEADS / DIM,  # their inner loss is a mean over the head size, ours the sum
    )
    layer = MemoryLayer(DIM, memory)
    return layer, lambda x: layer(x)[0]


def build_peer(chunk: int):
    from titans_pytorch import MemoryMLP, NeuralMemory

    size = DIM // HEADS
    layer = NeuralMemory(
        dim=DIM,
        heads=HEADS,
        dim_head=size,
        chunk_size=chunk,
        batch_size=chunk,
        model=MemoryMLP(size, DEPTH, expansion_factor=float(EXPANSION)),
        mem_model_norm_add_residual=False,
        default_step_transform_max_lr=MAX_LR,
    )
    return layer, lambda x: layer(x)[0]


def measure(side: str, chunk: int, tokens: int) -> dict:
    """One point, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer, call = (build_ours if side == OURS else build_peer)(chunk)
    x = torch.randn(1, tokens, DIM, requires_grad=True)

    def step():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        loss = call(x).square().mean()
        loss.backward()
        if not (loss.isfinite() and x.grad.isfinite().all()):
            raise FloatingPointError(f"{side} at chunk {chunk}, {tokens} tokens: not finite")

    built = resident_bytes()
    reset_peak()
    warm = best_cpu_seconds(step, 1)
    # a first call that takes this long is hardly slower than a second
    seconds = warm if warm > 20 else best_cpu_seconds(step, max(1, min(10, math.ceil(4 / warm))))
    point = {
        "side": side,
        "chunk": chunk,
        "tokens": tokens,
        "cpu_seconds": seconds,
        "tokens_per_cpu_second": tokens / seconds,
        "peak_gib": (resident_bytes(peak=True) - built) / GIB,
    }
    if side == OURS and tokens == 4096:
        with flop_counter() as counter:
            step()
        a = torch.randn(1024, 1024)
        rate = 2 * 1024**3 / best_cpu_seconds(lambda: a @ a, 10)
        point |= {"flops_per_token": counter.get_total_flops() / tokens, "matmul_flops_per_second": rate}
    return point


def measure_all(lengths: list[int], chunks: list[int], rounds: int) -> list[dict]:
    """All points, both sides alternating; 64K tokens on our side only, and a point of more than a minute once only."""
    best: dict[tuple, dict] = {}
    keys = [(c, t, side) for c in chunks for t in lengths for side in ((OURS, PEER) if t <= 32768 else (OURS,))]
    for number in range(rounds):
        for key in keys:
            if key in best and best[key]["cpu_seconds"] > 60:
                continue
            chunk, tokens, side = key
            point = run_point("benchmarks.memory_scan_cpu", {"side": side, "chunk": chunk, "tokens": tokens})
            if key not in best or point["cpu_seconds"] < best[key]["cpu_seconds"]:
                best[key] = point
            print(f"round {number + 1}: {side}, chunk {chunk}, {tokens} tokens", file=sys.stderr)
    return list(best.values())


def table_of(points: list[dict]) -> str:
    found = {(p["chunk"], p["tokens"], p["side"]): p for p in points}
    rows = []
    for chunk, tokens in sorted({(c, t) for c, t, _ in found}):
        ours, peer = (found.get((chunk, tokens, side)) for side in (OURS, PEER))
        speed = [f"{p['tokens_per_cpu_second']:,.0f}" if p else "" for p in (ours, peer)]
        memory = [f"{p['peak_gib']:.2f}" if p else "" for p in (ours, peer)]
        times = f"{ours['tokens_per_cpu_second'] / peer['tokens_per_cpu_second']:.1f}" if peer else ""
        rows.append([f"{chunk}", f"{tokens:,}", *speed, times, *memory])
    header = ["chunk", "tokens", f"{OURS}, tokens/s", f"{PEER}, tokens/s", "times", f"{OURS}, GiB", f"{PEER}, GiB"]
    return markdown_table(header, rows)


def ceilings_of(points: list[dict]) -> str:
    """What our matrix products alone allow: an upper bound that no implementation of this layer in float32 can pass."""
    found = {(p["chunk"], p["tokens"], p["side"]): p for p in points}
    lines = []
    for (chunk, tokens, _), p in sorted(found.items()):
        if "flops_per_token" not in p:
            continue
        most = p["matmul_flops_per_second"] / p["flops_per_token"]
        line = (
            f"chunk {chunk}: {p['flops_per_token'] / 1e6:.2f} MFLOP of matrix products a token; at the "
            f"{p['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s of a product of 1024 x 1024 in this run at most {most:,.0f} tokens/s"
        )
        if (chunk, tokens, PEER) in found:
            line += f", {most / found[chunk, tokens, PEER]['tokens_per_cpu_second']:.1f} times {PEER}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def bars_of(points: list[dict]) -> list[Bar]:
    """The bars whose points were measured."""
    found = {(p["chunk"], p["tokens"], p["side"]): p for p in points}
    speed = {key: p["tokens_per_cpu_second"] for key, p in found.items()}
    chunks = sorted({chunk for chunk, _, _ in found})
    bars = [
        Bar(
            f"speed over {PEER}, 4K tokens, chunk {c}", speed[c, 4096, OURS] / speed[c, 4096, PEER], SPEEDUP[c], "times"
        )
        for c in chunks
        if c in SPEEDUP and (c, 4096, PEER) in found
    ]
    if (16, 32768, OURS) in found:
        bars.append(Bar("memory, 32K tokens, chunk 16", found[16, 32768, OURS]["peak_gib"], 1.0, "GiB", at_least=False))
    for c in chunks:
        flat = [speed[c, t, OURS] for t in (4096, 8192, 16384, 32768, 65536) if (c, t, OURS) in found]
        if (c, 4096, OURS) in found and (c, 65536, OURS) in found:
            bars.append(Bar(f"slowest over fastest, 4K to 64K tokens, chunk {c}", min(flat) / max(flat), 0.85, "times"))
    return bars


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << n for n in range(10, 17)], metavar="T")
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64], metavar="C")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--point", type=json.loads, help="measure this point only, in this process")
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(**args.point)))
        return
    setup = describe_setup(1, "titans-pytorch")
    print("\n".join(f"{name}: {value}" for name, value in setup.items()) + "\n")
    points = measure_all(args.lengths, args.chunks, args.rounds)
    print(table_of(points))
    print(ceilings_of(points))
    finish(args, setup, points, bars_of(points))


if __name__ == "__main__":
    main()
