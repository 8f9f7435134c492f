"""Part 3, step: whole training steps of the shipped sizes, beside the same trunk without memory, and where their time goes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import torch

from benchmarks.gpu.harness import Session, ceilings, peak_gib, seconds_of
from titans_pretrain.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from titans_pretrain.config.model import MemoryConfig
from titans_pretrain.data.reader import Batch

# configs/model/titans-SIZE.yaml, for machines that cannot read YAML; a test compares.
SIZES = {
    "170m": dict(dim=768, layers=12, heads=16, memories=12),
    "760m": dict(dim=1536, layers=24, heads=16, memories=24),
    "1.3b": dict(dim=2048, layers=18, heads=8, memories=32),
    "tiny": dict(dim=64, layers=2, heads=2, memories=2),
}
VARIANTS = ("mag", "lmm", "transformer, full", "transformer, window")
SEGMENT = 32768  # tokens of a segment of the longest row


def model_config(size: str, variant: str) -> ModelConfig:
    """variant: of the model; a transformer's says what it sees."""
    shape = dict(SIZES[size])
    memory = MemoryConfig(heads=shape.pop("memories"))
    small = dict(vocab_size=512, window=64, persistent_tokens=4) if size == "tiny" else {}
    c = ModelConfig(**dict(vocab_size=32000, window=2048, persistent_tokens=128) | shape | small, memory=memory)
    name, _, sees = variant.partition(", ")
    if sees == "full":
        return replace(c, variant=name, window=None, persistent_tokens=0, rotary_percent=1.0)
    return replace(c, variant=name)


def step_config(size: str, variant: str, rows: int, tokens: int, device: torch.device, segments: int = 1) -> Config:
    return Config(
        model=model_config(size, variant),
        data=DataConfig(seq_len=tokens),
        train=TrainConfig(
            micro_batch=rows, global_batch=rows, precision="bf16" if device.type == "cuda" else "fp32", device=device.type,
            recompute="segment" if segments > 1 else "block",
        ),
        parallel=ParallelConfig(segments_per_rank=segments),
    )  # fmt: skip


def build(config: Config, device: torch.device):
    """The engine that training uses, and a step of it on random tokens."""
    from titans_pretrain.models import build_model
    from titans_pretrain.parallel.apply import build_engine
    from titans_pretrain.parallel.mesh import Mesh

    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(config.model)
    engine = build_engine(config, model, Mesh(device))
    rows, tokens = config.train.micro_batch, config.data.seq_len
    x = torch.randint(0, config.model.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))
    where = torch.arange(tokens).expand(rows, -1).contiguous()
    batch = Batch(x, x.roll(-1, 1), where)

    def step() -> torch.Tensor:
        loss = engine.forward_backward([batch], rows * tokens)
        engine.update(1e-5, loss)
        return loss

    return engine, step


def step(s: Session) -> None:
    tiny = s.quick
    top = ceilings(s.device, s.quick)
    s.write(test="ceilings", **top)

    def measure(test: str, size: str, variant: str, rows: int, tokens: int, segments: int = 1) -> dict:
        return step_figures(s, top, step_config(size, variant, rows, tokens, s.device, segments))

    main, short, longer, long = (
        ("tiny", (2, 128), (1, 256), (1, 512)) if tiny else ("760m", (8, 4096), (2, 16384), (1, 32768))
    )
    s.point(lambda test, size: first_step(s, size), test="first step", size="tiny" if tiny else "170m")
    for rows, tokens in (short, longer):
        for variant in VARIANTS[:3]:
            s.point(measure, test="step", size=main, variant=variant, rows=rows, tokens=tokens)
    s.point(
        lambda test, size, **shape: parts_of_step(s, size, **shape),
        test="parts",
        size=main,
        rows=short[0],
        tokens=short[1],
    )
    s.point(measure, test="step", size=main, variant="mag", rows=long[0], tokens=long[1])
    tokens, segments = (512, 4) if tiny else (1 << 20, (1 << 20) // SEGMENT)
    s.point(measure, test="step", size=main, variant="mag", rows=1, tokens=tokens, segments=segments)
    for size in () if tiny else ("170m", "1.3b"):
        for variant in VARIANTS:
            for rows, tokens in (short, long):
                s.point(measure, test="step", size=size, variant=variant, rows=rows, tokens=tokens)
    s.point(measure, test="step", size=main, variant=VARIANTS[3], rows=short[0], tokens=short[1])


def step_figures(s: Session, top: dict, config: Config) -> dict:
    from titans_pretrain.training.gauge import model_flops, peak_flops

    _, step = build(config, s.device)
    tokens = config.train.global_batch * config.data.seq_len
    losses = []
    peak = 0.0
    if config.data.seq_len >= 1 << 19:  # once: a step takes long, and its first call is hardly slower
        if s.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(s.device)
        start = time.perf_counter()
        losses.append(float(step()))
        seconds = first = time.perf_counter() - start
        if s.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(s.device) / 2**30
    else:
        seconds, first = seconds_of(lambda: losses.append(step()), s.device, 1.5, most=10)
        held = torch.cuda.memory_allocated(s.device) / 2**30 if s.device.type == "cuda" else 0.0
        peak = held + peak_gib(step, s.device)
    loss = float(losses[-1])
    assert torch.tensor(loss).isfinite(), f"the loss is {loss}"
    work = model_flops(config) * tokens / seconds
    known = peak_flops(s.device, config.train.precision)
    return {
        "seconds": seconds, "first_seconds": first, "tokens_per_second": tokens / seconds, "peak_gib": peak, "loss": loss,
        "tflops": work / 1e12, "mfu": work / known if known else None, "of_ceiling": work / top["flops_per_second"],
    }  # fmt: skip


def parts_of_step(s: Session, size: str, rows: int, tokens: int) -> dict:
    """Seconds of a mag step's parts, each alone, forward twice and backward once as with recompute=block, times its number."""
    from titans_pretrain.training.engine import compute_dtype

    config = step_config(size, "mag", rows, tokens, s.device)
    engine, step = build(config, s.device)
    whole, _ = seconds_of(step, s.device, 1.0, most=5)
    block, count = engine.model.layers[0], config.model.layers
    x = torch.randn(rows, tokens, config.model.dim, device=s.device, requires_grad=True)
    where = torch.arange(tokens, device=s.device).expand(rows, -1).contiguous()
    by = engine.model.rotations(where, x.dtype)[block.attention.rotary_dim]
    labels = torch.zeros(rows, tokens, dtype=torch.int64, device=s.device)
    calls = {
        "memory": (lambda: block.memory(x, None, where, block.persistent)[0], count, 1),
        "attention": (lambda: block.attention(x, None, by, where, block.persistent)[0], count, 1),
        "mlp": (lambda: block.mlp(x), count, 1),
        "loss": (lambda: engine.model.loss(x, labels)[0] / labels.numel(), 1, 0),
    }
    found = {}
    for name, (call, number, again) in calls.items():

        def run(call=call, again=again):
            with compute_dtype(s.device, config.train.precision):
                if again:
                    with torch.no_grad():
                        call()
                call().sum().backward()

        found[name] = seconds_of(run, s.device, 0.5)[0] * number
        engine.model.zero_grad()
    loss = torch.zeros((), device=s.device)
    zeros = [(p, torch.zeros_like(p)) for p in engine.model.parameters()]

    def optimize():
        for p, gradient in zeros:
            p.grad = gradient
        engine.update(0.0, loss)

    found["optimizer"] = seconds_of(optimize, s.device, 0.5)[0]
    found["rest"] = whole - sum(found.values())
    shares = {f"{name}_share": round(seconds / whole, 3) for name, seconds in found.items()}
    return {"step_seconds": whole} | {f"{name}_seconds": seconds for name, seconds in found.items()} | shares


def first_step(s: Session, size: str) -> dict:
    """The first step of a process: with empty caches of compiled kernels, and with those that it left."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "TRITON_CACHE_DIR": f"{cache}/triton",
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        }
        command = [sys.executable, "-m", "benchmarks.gpu.step", size, s.device.type]
        for name in ("cold", "warm"):
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
            found[f"{name}_seconds"] = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return found


if __name__ == "__main__":
    place = torch.device(sys.argv[2])
    _, one = build(step_config(sys.argv[1], "mag", 2, 128 if sys.argv[1] == "tiny" else 4096, place), place)
    begin = time.perf_counter()
    float(one())
    print(json.dumps({"seconds": time.perf_counter() - begin}))
