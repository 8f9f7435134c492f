"""The rules of a layout, as functions of a config and a number of processes: what fits, and which layers a pipeline stage holds.

Nothing here starts a process or a group; mesh.py does.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import gcd

from titans_pretrain.config import Config
from titans_pretrain.config.model import MemoryConfig, ModelConfig
from titans_pretrain.models.costs import head_cost, layer_cost
from titans_pretrain.parallel.zero_settings import zero_settings


def needs_segments(config: Config) -> bool:
    p, train = config.parallel, config.train
    return p.segments > 1 or train.recompute == "segment" or train.truncate_state_gradient_every is not None


def check_layout(config: Config, world: int) -> int:
    """The data-parallel degree of `world` processes. Raises ValueError, naming the numbers and a layout that would work."""
    p, train = config.parallel, config.train
    model = p.tp * p.cp * p.pp
    if world % model:
        raise ValueError(
            f"{world} processes do not divide into parallel.tp={p.tp} * parallel.cp={p.cp} * parallel.pp={p.pp} = {model}; "
            f"start {-(-world // model) * model} processes, or choose degrees whose product divides {world}"
        )
    dp = world // model
    for key, batch in train.batches:
        _check_batch(config, dp, key, batch)
    check_tensor_parallel(config.model, p.tp, p.sequence_parallel, p.memory_split)
    for length in reversed(config.data.lengths):
        if p.sequence_parallel and (length // p.segments) % p.tp:
            key = "data.seq_len" if length == config.data.seq_len else "data.seq_len_warmup"
            raise ValueError(
                f"parallel.sequence_parallel needs segments of a multiple of parallel.tp={p.tp} tokens, got {key}={length} in "
                f"{p.segments} segments"
            )
    stages = p.pp * p.stages_per_rank
    if stages > config.model.layers:
        raise ValueError(
            f"model.layers={config.model.layers} is fewer than {stages} pipeline stages (parallel.pp={p.pp} * "
            f"parallel.stages_per_rank={p.stages_per_rank}); lower parallel.pp to {config.model.layers} or less"
        )
    if p.pp == 1 and p.stages_per_rank > 1:
        raise ValueError(
            f"parallel.stages_per_rank={p.stages_per_rank} cuts what a pipeline rank holds, and parallel.pp=1 has no pipeline: raise "
            "parallel.pp, or set parallel.stages_per_rank=1 and parallel.pipeline_schedule=1f1b"
        )
    if p.inflight > 1 and (p.cp == 1 or p.pp > 1):
        raise ValueError(
            f"parallel.inflight={p.inflight} fills a context-parallel ring: it needs parallel.cp > 1 and "
            "parallel.pp=1 (a pipeline's schedule says itself what is in flight)"
        )
    _check_zero(config)
    return dp


def _check_batch(config: Config, dp: int, key: str, batch: int) -> None:
    """Whether so many rows of a step spread over the data-parallel processes and, as micro-batches, over a pipeline."""
    p, rows = config.parallel, config.train.micro_batch * dp
    if batch % rows:
        raise ValueError(
            f"{key}={batch} must be a multiple of train.micro_batch={config.train.micro_batch} * {dp} "
            f"data-parallel processes = {rows}; try {key}={-(-batch // rows) * rows}"
        )
    micro_batches = batch // rows
    if p.pp > 1 and micro_batches < p.pp:
        raise ValueError(
            f"parallel.pp={p.pp} needs as many micro-batches in a step, got {micro_batches}: try {key}={rows * p.pp}"
        )
    rounds = max(1, micro_batches // p.pp)
    if p.pipeline_schedule == "interleaved" and micro_batches % rounds:
        raise ValueError(
            f"parallel.pipeline_schedule=interleaved needs micro-batches in {rounds} equal rounds, got {micro_batches}: "
            f"try {key}={rows * rounds * p.pp}"
        )


def _check_zero(config: Config) -> None:
    p = config.parallel
    if config.deepspeed and not p.zero_stage:
        raise ValueError(
            f"deepspeed.{next(iter(config.deepspeed))} is set, but parallel.zero_stage=0 runs without DeepSpeed: set "
            "parallel.zero_stage=1, 2 or 3, or remove the deepspeed block"
        )
    if p.zero_stage:
        zero_settings(config, 1)
    if p.zero_stage > 1 and p.pp > 1:
        raise ValueError(
            f"parallel.zero_stage={p.zero_stage} with parallel.pp={p.pp}: a pipeline accumulates gradients over its "
            "micro-batches, which stages 2 and 3 would reduce one by one; use parallel.zero_stage=1"
        )
    if p.zero_stage == 3 and (p.segments > 1 or config.train.recompute == "segment"):
        raise ValueError(
            "parallel.zero_stage=3 cannot run sequences in segments (parallel.cp > 1, parallel.segments_per_rank > 1 or "
            "train.recompute=segment): it gathers parameters inside the layer loop, where the ranks of a ring are at "
            "different layers; use parallel.zero_stage=2"
        )
    if p.zero_stage == 3 and config.train.ema:
        raise ValueError(
            f"train.ema={config.train.ema} keeps an average of what a process holds, with parallel.zero_stage=3 never whole: use "
            "parallel.zero_stage=1 or 2, or train.ema=0"
        )
    if p.zero_stage == 3 and config.train.optimizer == "muon":
        raise ValueError(
            "train.optimizer=muon needs whole matrices, and parallel.zero_stage=3 never has them together in an update: use "
            "parallel.zero_stage=1 or 2, or train.optimizer=adamw"
        )


def check_tensor_parallel(c: ModelConfig, tp: int, sequence_parallel: bool, memory_split: str) -> None:
    """Raises ValueError where a model cannot be spread over tp ranks; the message names the key and a setting that works."""
    if tp == 1:
        if sequence_parallel:
            raise ValueError(
                "parallel.sequence_parallel splits the sequence over tensor-parallel ranks: with parallel.tp=1 set it to false"
            )
        return
    hidden = memory_split == "hidden"
    sizes, other_ways = {"model.vocab_size": c.vocab_size}, {}
    for i, layer in enumerate(c.layer_configs):
        key = partial(_key_of, c, i)
        sizes[key("ffn_dim")] = layer.ffn_dim
        if layer.has_attention:
            sizes[key("heads")] = layer.heads
            if layer.kv_heads != layer.heads:
                sizes[key("kv_heads")] = layer.kv_heads
                larger = [n for n in range(tp, layer.heads + 1, tp) if layer.heads % n == 0]
                other_ways[key("kv_heads")] = [f"{key('kv_heads')}={n}" for n in larger[:1]]
        if layer.has_memory and hidden:
            _check_hidden_split(layer.memory, key)
            inner = f"the hidden size of a memory, {key('memory.expansion')} * model.dim / {key('memory.heads')}"
            sizes[inner] = layer.memory.widths(c.dim)[1]
        elif layer.has_memory:
            sizes[key("memory.heads")] = layer.memory.heads
            if all(other.memory.depth == 2 for other in c.layer_configs if other.has_memory):
                other_ways[key("memory.heads")] = ["parallel.memory_split=hidden"]
        other_ways[key("ffn_dim")] = [f"{key('ffn_dim')}={-(-layer.ffn_dim // tp) * tp}"]
    other_ways["model.vocab_size"] = [f"model.vocab_size={-(-c.vocab_size // tp) * tp}"]
    common = gcd(*sizes.values())
    legal = [str(n) for n in range(1, common + 1) if common % n == 0]
    for name, size in sizes.items():
        if size % tp:
            ways = [f"parallel.tp={' or '.join(legal)}", *other_ways.get(name, [])]
            raise ValueError(f"{name}={size} does not divide over parallel.tp={tp}: use {', or '.join(ways)}")


def _check_hidden_split(memory: MemoryConfig, key: Callable[[str], str]) -> None:
    if memory.depth != 2:
        raise ValueError(
            f"parallel.memory_split=hidden needs {key('memory.depth')}=2, got {memory.depth}: use parallel.memory_split=heads"
        )
    if memory.backend == "reference":
        raise ValueError(
            "parallel.memory_split=hidden cannot run model.memory.backend=reference: use auto or chunked, or "
            "parallel.memory_split=heads"
        )


def _key_of(c: ModelConfig, layer: int, name: str) -> str:
    """The key that gives a layer this value: its entry's in model.pattern, or the model's own."""
    entry = layer % len(c.pattern or [None])
    found = c.pattern[entry] if c.pattern else {}
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return f"model.{name}" if found is None else f"model.pattern[{entry}].{name}"


def cut_layers(costs: Sequence[float], first: float, last: float, stages: int) -> list[range]:
    """Consecutive, non-empty ranges of layers, one per stage, with the smallest possible cost of the dearest stage.

    costs: of each layer; first, last: what the embedding adds to the first stage and the head to the last."""
    layers = len(costs)
    assert 1 <= stages <= layers
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def cost(start: int, stop: int) -> float:
        return sums[stop] - sums[start] + (first if start == 0 else 0) + (last if stop == layers else 0)

    # best[n][stop]: (cost of the dearest of n stages over layers [0, stop), where the last of them starts)
    best = [{stop: (cost(0, stop), 0) for stop in range(1, layers + 1)}]
    for n in range(1, stages):
        best.append(
            {
                stop: min((max(best[n - 1][start][0], cost(start, stop)), start) for start in range(n, stop))
                for stop in range(n + 1, layers + 1)
            }
        )
    cuts, stop = [], layers
    for n in reversed(range(stages)):
        start = best[n][stop][1]
        cuts.append(range(start, stop))
        stop = start
    return cuts[::-1]


def stage_layers(c: ModelConfig, stages: int, seq_len: int) -> list[range]:
    """The layers of each stage, balanced by cost; the head's counts, an embedding's lookup is free."""
    return cut_layers([layer_cost(layer, seq_len) for layer in c.layer_configs], 0.0, head_cost(c), stages)
