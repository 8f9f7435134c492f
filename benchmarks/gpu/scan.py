"""Part 2, scan: the memory scan alone, forward and backward, beside what this card can do, the same in torch, and peers."""

import importlib.util

import torch

from benchmarks.gpu.harness import HEAD, Session, ceilings, gradients, peak_gib, scan_call, seconds_of, served_backend

HEADS = 24  # of 760M: a width of 1536
SHAPES = [(8, 4096), (1, 32768), (1, 131072)]  # batch, tokens
MEMORIES = [(2, 4), (1, 1), (2, 1), (2, 2)]  # depth, expansion
CHUNKS = [64, 16, 512]
# A Titans-like layer on an A100 (engineerA314's fork of titans-pytorch, BENCHMARK_RESULTS.md): bfloat16, 14 heads of 64, expansion 4,
# depth 2, chunk 64, 4 x 2048 tokens.
PUBLIC = {"tokens_per_second": 134664, "batch": 4, "tokens": 2048, "heads": 14, "chunk": 64}


def scan(s: Session) -> None:
    shapes, heads = ([(2, 130)], 2) if s.quick else (SHAPES, HEADS)
    top = ceilings(s.device, s.quick)
    s.write(test="ceilings", **top)
    dtype = torch.bfloat16 if s.device.type == "cuda" else torch.float32

    def measure(test: str, side: str, **row) -> dict:
        return SIDES[side](s, dtype, top, heads=row.pop("heads", heads), **row)

    first = [(m, c, shape) for m in MEMORIES[:1] for c in CHUNKS[:2] for shape in shapes[:2]]
    rest = [(m, c, shape) for shape in shapes for m in MEMORIES for c in CHUNKS][: 4 if s.quick else None]
    for i, ((depth, expansion), chunk, (batch, tokens)) in enumerate(dict.fromkeys(first + rest)):
        row = dict(depth=depth, expansion=expansion, chunk=chunk, batch=batch, tokens=tokens)
        s.point(measure, test="scan", side="ours", **row)
        if i < len(shapes[:2]):
            s.point(measure, test="scan", side="ours, in a graph", **row)
        if i == len(first) - 1:  # what the bars need, before the rest of the table
            for c in CHUNKS[:2]:
                s.point(
                    measure,
                    test="scan",
                    side="chunked, eager",
                    **row | {"chunk": c, "batch": shapes[0][0], "tokens": shapes[0][1]},
                )
            public = {k: PUBLIC[k] for k in ("batch", "tokens", "chunk")}
            if s.quick:
                public = {"batch": 1, "tokens": 130, "chunk": 16}
            s.point(
                measure,
                test="layer",
                side="our layer",
                depth=2,
                expansion=4,
                heads=2 if s.quick else PUBLIC["heads"],
                **public,
            )
            for side, package in (("titans-pytorch", "titans_pytorch"), ("fla gated DeltaNet", "fla")):
                if importlib.util.find_spec(package) is None:
                    s.write(test="scan", side=side, skipped=f"{package} is not installed")
                else:
                    s.point(measure, test="scan", side=side, **row | {"batch": shapes[0][0], "tokens": shapes[0][1]})
    s.write(
        test="scan",
        side="chunked, compiled",
        skipped="its loop over spans is opaque to torch.compile: the eager figure stands",
    )


def flops_per_token(depth: int, expansion: int, chunk: int) -> tuple[float, float]:
    """Of one head, forward and in all, with what the backward pass recomputes (the dual form in tiles of at most 64)."""
    d, h, b = HEAD, expansion * HEAD, min(chunk, 64)
    if depth == 1:
        return 10 * d * d + 4 * b * d, 38 * d * d + 14 * b * d
    return 22 * d * h + 4 * b * (d + h), 90 * d * h + b * (14 * d + 16 * h)


def bytes_per_token(itemsize: int) -> tuple[float, float]:
    """Of one head, in and out of the card's memory if every state stays on chip: q, k, v, y and three gates; then these again, and their
    gradients."""
    forward = 4 * HEAD * itemsize + 12
    return forward, forward + 7 * HEAD * itemsize + 24


def scan_figures(call, leaves, s: Session, top: dict, tokens: int, heads: int, flops: tuple, moved: tuple) -> dict:
    """Of a call and its leaves: forward alone without gradients, and both."""
    with torch.no_grad():
        forward, _ = seconds_of(call, s.device, 0.4)
    both, first = seconds_of(lambda: gradients(call, leaves), s.device, 0.8)
    found = {"first_seconds": first, "peak_gib": peak_gib(lambda: gradients(call, leaves), s.device)}
    for name, seconds, f, b in (("forward", forward, flops[0], moved[0]), ("both", both, flops[1], moved[1])):
        work, traffic = f * tokens * heads, b * tokens * heads
        floor = max(work / top["flops_per_second"], traffic / top["bytes_per_second"])
        found |= {
            f"{name}_seconds": seconds, f"{name}_tokens_per_second": tokens / seconds, f"{name}_tflops": work / seconds / 1e12,
            f"{name}_gb_per_second": traffic / seconds / 1e9, f"{name}_of_floor": floor / seconds,
        }  # fmt: skip
    return found


def _scan(s: Session, dtype, top, *, batch, tokens, heads, depth, expansion, chunk, backend: str) -> dict:
    shape = dict(
        depth=depth,
        expansion=expansion,
        chunk=chunk,
        batch=batch,
        tokens=tokens,
        heads=heads,
        dtype=dtype,
        backend=backend,
    )
    call, leaves = scan_call(s.device, **shape)
    flops, moved = flops_per_token(depth, expansion, chunk), bytes_per_token(dtype.itemsize)
    found = scan_figures(call, leaves, s, top, batch * tokens, heads, flops, moved)
    return {"backend": served_backend(call) if backend == "auto" else backend, **found}


def ours(s, dtype, top, **row) -> dict:
    return _scan(s, dtype, top, **row, backend="auto")


def in_a_graph(s, dtype, top, *, batch, tokens, heads, **row) -> dict:
    """Forward and backward captured once, then replayed: against "ours" it says what the launches of a tile each cost the host."""
    if s.device.type != "cuda":
        return {"skipped": "for GPUs"}
    call, leaves = scan_call(s.device, batch=batch, tokens=tokens, heads=heads, dtype=dtype, **row)
    weight = torch.randn(batch, tokens, heads, HEAD, device=s.device).to(dtype)

    def both():
        return torch.autograd.grad(call()[0], list(leaves.values()), weight)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made once is made here
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    seconds, _ = seconds_of(graph.replay, s.device, 0.8)
    return {"both_seconds": seconds, "both_tokens_per_second": batch * tokens / seconds}


def eager(s, dtype, top, **row) -> dict:
    return _scan(s, dtype, top, **row, backend="chunked")


def layer_figures(call, x, parameters, s: Session) -> dict:
    leaves = [x, *parameters]

    def both():
        return torch.autograd.grad(call(x).float().square().sum(), leaves, allow_unused=True)

    seconds, first = seconds_of(both, s.device)
    tokens = x.shape[0] * x.shape[1]
    return {
        "both_seconds": seconds,
        "first_seconds": first,
        "both_tokens_per_second": tokens / seconds,
        "peak_gib": peak_gib(both, s.device),
    }


def our_layer(s, dtype, top, *, batch, tokens, heads, depth, expansion, chunk) -> dict:
    """The whole memory layer, in the public figure's shape: projections, convolutions, gates and norms around the scan."""
    from titans_pretrain.config.model import MemoryConfig
    from titans_pretrain.models.memory import MemoryLayer

    dim = heads * HEAD
    layer = MemoryLayer(dim, MemoryConfig(heads=heads, depth=depth, expansion=float(expansion), chunk_size=chunk)).to(
        s.device
    )
    x = torch.randn(batch, tokens, dim, device=s.device, requires_grad=True)
    with torch.autocast(s.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return layer_figures(lambda x: layer(x)[0], x, list(layer.parameters()), s)


def titans_pytorch(s, dtype, top, *, batch, tokens, heads, depth, expansion, chunk) -> dict:
    from titans_pytorch import MemoryMLP, NeuralMemory

    dim = heads * HEAD
    model = MemoryMLP(HEAD, depth, expansion_factor=float(expansion))
    layer = NeuralMemory(dim=dim, heads=heads, dim_head=HEAD, chunk_size=chunk, batch_size=chunk, model=model).to(
        s.device
    )
    x = torch.randn(batch, tokens, dim, device=s.device, requires_grad=True)
    with torch.autocast(s.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return layer_figures(lambda x: layer(x)[0], x, list(layer.parameters()), s)


def fla_gated_delta(s, dtype, top, *, batch, tokens, heads, depth, expansion, chunk) -> dict:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v = (
        torch.randn(batch, tokens, heads, HEAD, device=s.device, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    g = torch.full((batch, tokens, heads), -0.01, device=s.device, requires_grad=True)
    beta = torch.full((batch, tokens, heads), 0.5, device=s.device, dtype=dtype, requires_grad=True)

    def call(q):
        return chunk_gated_delta_rule(q, torch.nn.functional.normalize(k, dim=-1), v, g=g, beta=beta)[0]

    return layer_figures(call, q, [k, v, g, beta], s)


SIDES = {
    "ours": ours,
    "ours, in a graph": in_a_graph,
    "chunked, eager": eager,
    "our layer": our_layer,
    "titans-pytorch": titans_pytorch,
    "fla gated DeltaNet": fla_gated_delta,
}
