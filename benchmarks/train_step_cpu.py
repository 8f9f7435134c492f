"""Where the time of a training step goes on a CPU: each variant, and the windowed transformer of the same width.

    python -m benchmarks.train_step_cpu                              # about five minutes on one core
    python -m benchmarks.train_step_cpu --variants mag transformer --tokens 1024 --rounds 1
    python -m benchmarks.train_step_cpu --json step.json --strict

The models are the defaults of `model` (width 256, 4 layers, vocabulary 32000, window 2048; memory of 4 heads, depth 2, expansion 4,
chunk 16), one row of tokens per step, float32, one thread. The step is the trainer's own. CPU seconds and the floating-point
operations of the matrix products really run are split among its parts; "of peak" compares their rate with that of a 1024 x 1024
matrix product, measured in the same process. A part's backward pass counts as the part; "rest" is embeddings, norms, residuals and
gates between the parts.
"""

import contextlib
import json
import pkgutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from benchmarks.common import Bar, argument_parser, best_cpu_seconds, describe_setup, finish, flop_counter, run_point
from titans_pretrain.config import Config, ModelConfig
from titans_pretrain.config.model import VARIANTS
from titans_pretrain.config.schema import DataConfig, TrainConfig
from titans_pretrain.evaluation.figures import markdown_table

PARTS = ("attention", "memory", "mlp", "loss", "optimizer", "data", "rest")
LIMIT = 2.0  # a memory variant's step over the transformer's

# What belongs to a part: methods and functions, by the module that calls them.
SCOPES = {
    "attention": (
        "titans_pretrain.models.attention.AttentionLayer.forward",
        "titans_pretrain.models.attention.AttentionLayer.queries",
        "titans_pretrain.models.attention.AttentionLayer.keys_values",
        "titans_pretrain.models.attention.AttentionLayer.positionless",
        "titans_pretrain.models.attention.AttentionLayer.merge",
        "titans_pretrain.models.mac.segment_attention",
    ),
    "memory": (
        "titans_pretrain.models.memory.MemoryLayer.forward",
        "titans_pretrain.models.memory.MemoryLayer.initial",
        "titans_pretrain.models.memory.MemoryLayer.retrieve",
    ),
    "mlp": ("titans_pretrain.models.mlp.SwiGLU.forward",),
    "optimizer": ("torch.nn.utils.clip_grad_norm_",),
}


class Split:
    """Shares out what `read` counts (seconds, operations) among parts: always to the one that is current."""

    def __init__(self, read: Callable[[], float]):
        self.totals: dict[str, float] = defaultdict(float)
        self._read, self._part, self._last = read, "rest", read()

    def switch(self, part: str) -> str:
        """Makes a part the current one; returns the one before."""
        now = self._read()
        self.totals[self._part] += now - self._last
        before, self._part, self._last = self._part, part, now
        return before

    def wrap(self, part: str, call: Callable) -> Callable:
        """The call as a scope of this part, its backward pass too."""

        def scoped(*args, **kwargs):
            if self._part == part:
                return call(*args, **kwargs)
            args, kwargs = _marked((args, kwargs), lambda: self.switch("rest"))  # its backward pass ends here
            before = self.switch(part)
            out = call(*args, **kwargs)
            self.switch(before)
            return _marked(out, lambda: self.switch(part))

        return scoped


class _Mark(torch.autograd.Function):
    """Identity; calls `reached` when the backward pass comes by."""

    @staticmethod
    def forward(ctx, reached, *tensors):
        ctx.reached = reached
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        ctx.reached()
        return None, *gradients


def _marked(tree, reached: Callable[[], object]):
    leaves, shape = pytree.tree_flatten(tree)
    chosen = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if chosen and torch.is_grad_enabled():
        for i, t in zip(chosen, _Mark.apply(reached, *(leaves[i] for i in chosen)), strict=True):
            leaves[i] = t
    return pytree.tree_unflatten(leaves, shape)


@contextlib.contextmanager
def scopes(split: Split, trainer) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for part, names in SCOPES.items():
            for name in names:
                stack.enter_context(mock.patch(name, split.wrap(part, pkgutil.resolve_name(name))))
        for part, owner, name in (
            ("optimizer", trainer.engine.optimizer, "step"),
            ("loss", trainer.engine.model, "cross_entropy"),
            *(
                ("memory", m.retrieve_proj, "forward")
                for m in trainer.engine.model.layers
                if getattr(m, "retrieve_proj", None)
            ),
        ):
            stack.enter_context(mock.patch.object(owner, name, split.wrap(part, getattr(owner, name))))
        read = split.wrap("data", type(trainer.reader).__next__)
        stack.enter_context(mock.patch.object(type(trainer.reader), "__next__", lambda reader: read(reader)))
        yield


def build_trainer(variant: str, tokens: int, folder: Path):
    from benchmarks.data import write_corpus
    from titans_pretrain.data import build_reader
    from titans_pretrain.models import build_model
    from titans_pretrain.training.engine import SingleEngine
    from titans_pretrain.training.trainer import Trainer

    config = Config(
        model=ModelConfig(variant=variant),
        data=DataConfig(path=str(folder), seq_len=tokens),
        train=TrainConfig(micro_batch=1, global_batch=1, eval_every=0),
    )
    write_corpus(folder, 20 * tokens, mean_length=1000)
    torch.manual_seed(0)
    device = torch.device("cpu")
    engine = SingleEngine(config, build_model(config.model), device)
    return Trainer(config, engine, build_reader(config, split="train"), None, device)


def measure(variant: str, tokens: int) -> dict:
    """One variant, in this process: seconds and operations of each part in the best of three steps after a warm-up."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(variant, tokens, Path(folder))
        trainer.train_step()
        with flop_counter() as counter:
            flops = _split_step(trainer, counter.get_total_flops)
        steps = [_split_step(trainer, time.process_time) for _ in range(3)]
        best = min(steps, key=lambda step: sum(step.values()))
    a = torch.randn(1024, 1024)
    return {
        "variant": variant,
        "tokens": tokens,
        "parameters": sum(p.numel() for p in trainer.engine.model.parameters()),
        "seconds": {part: best.get(part, 0.0) for part in PARTS},
        "flops": {part: flops.get(part, 0) for part in PARTS},
        "matmul_flops_per_second": 2 * 1024**3 / best_cpu_seconds(lambda: a @ a, 10),
    }


def _split_step(trainer, read: Callable[[], float]) -> dict[str, float]:
    split = Split(read)
    with scopes(split, trainer):
        trainer.train_step()
    split.switch("rest")
    return split.totals


def measure_all(variants: list[str], tokens: int, rounds: int) -> list[dict]:
    best: dict[str, dict] = {}
    for number in range(rounds):
        for variant in variants:
            point = run_point("benchmarks.train_step_cpu", {"variant": variant, "tokens": tokens})
            old = best.setdefault(variant, point)
            if step_seconds(point) < step_seconds(old):
                best[variant] = point
            print(f"round {number + 1}: {variant}", file=sys.stderr)
    return list(best.values())


def step_seconds(point: dict) -> float:
    return sum(point["seconds"].values())


def table_of(points: list[dict]) -> str:
    peak = max(p["matmul_flops_per_second"] for p in points)
    rows = []
    for p in points:
        whole = step_seconds(p)
        parts = [(part, p["seconds"][part], p["flops"][part]) for part in PARTS]
        for part, seconds, flops in [*parts, ("step", whole, sum(p["flops"].values()))]:
            if seconds:
                rate = f"{flops / seconds / peak:.0%}" if flops else ""
                rows.append(
                    [p["variant"], part, f"{1e3 * seconds:,.1f}", f"{seconds / whole:.0%}", f"{flops / 1e9:,.1f}", rate]
                )
    return markdown_table(["variant", "part", "ms", "of step", "GFLOP", "of peak"], rows) + (
        f"\n\npeak: a 1024 x 1024 matrix product runs at {peak / 1e9:.1f} GFLOP/s"
    )


def bars_of(points: list[dict]) -> list[Bar]:
    seconds = {p["variant"]: step_seconds(p) for p in points}
    base = seconds.pop("transformer", None)
    if base is None:
        return []
    return [
        Bar(f"step of {v} over the transformer's", s / base, LIMIT, "times", at_least=False) for v, s in seconds.items()
    ]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="V")
    parser.add_argument("--tokens", type=int, default=4096, help="in a step (default: 4096)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--point", type=json.loads, help="measure this variant only, in this process")
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(**args.point)))
        return
    setup = describe_setup(1)
    print("\n".join(f"{name}: {value}" for name, value in setup.items()) + "\n")
    points = measure_all(args.variants, args.tokens, args.rounds)
    print(table_of(points))
    finish(args, setup, points, bars_of(points))


if __name__ == "__main__":
    main()
