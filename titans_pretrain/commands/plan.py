"""What a config amounts to, before anything runs: parameters, FLOPs, layout, memory, and steps against data."""

import itertools

import torch
from torch import nn

from titans_pretrain.commands.layout import Layout, build_layout, needed_memory, ring_efficiency
from titans_pretrain.commands.table import format_table
from titans_pretrain.config import Config
from titans_pretrain.models import build_model
from titans_pretrain.models.costs import layer_flops
from titans_pretrain.parallel.layout import needs_segments
from titans_pretrain.parallel.zero_keys import check_block


def plan(config: Config, processes: int | None = None) -> str:
    """The tables as text, for so many processes (None: as few as the degrees allow). Reads no tokens, allocates no weights.

    Raises ValueError for a layout that a run would refuse."""
    layout = build_layout(config, processes)
    check_block(config)
    with torch.device("meta"):
        model = build_model(config.model)
    parts = parameters_by_part(model)
    total = sum(parts.values())
    forward, training = flops_per_token(config)
    tokens = config.train.global_batch * config.data.seq_len
    all_tokens = config.train.rows_until(config.train.steps) * config.data.seq_len
    memory = needed_memory(config, processes)
    memory["all"] = sum(memory.values())
    tables = {
        "parameters": {**{k: f"{v:,}" for k, v in parts.items()}, "total": f"{total:,}"},
        "a step": {
            "tokens": f"{tokens:,} ({config.train.global_batch} rows of {config.data.seq_len:,})",
            "micro-batches": f"{layout.micro_batches} of {config.train.micro_batch} rows"
            + (f" on each of {layout.dp} data-parallel ranks" if layout.dp > 1 else ""),
            "FLOPs per token": f"{training / 1e6:,.1f} M in training, {forward / 1e6:,.1f} M forward",
            "FLOPs": f"{training * tokens / 1e12:,.2f} T",
        }
        | _warmups(config),
        "layout": _layout(layout),
        "memory of a process, estimated": {k: f"{v / 2**20:,.0f} MiB" for k, v in memory.items()},
        "the run": {
            "steps": f"{config.train.steps:,}",
            "tokens": f"{all_tokens:,} ({all_tokens / total:.1f} per parameter)",
            "FLOPs": f"{run_flops(config):.2e}",
            "data": _data(config, all_tokens),
        },
    }
    return "\n\n".join(f"{title}\n{format_table(rows)}" for title, rows in tables.items() if rows)


def _warmups(config: Config) -> dict[str, str]:
    """Before the steps that the other rows describe."""
    pairs = {"rows before": config.train.batch_warmup, "tokens in a row before": config.data.seq_len_warmup}
    return {
        name: ", ".join(f"{value:,} up to step {stop:,}" for (_, value), (stop, _) in itertools.pairwise(steps))
        for name, steps in pairs.items()
        if len(steps) > 1
    }


def _layout(layout: Layout) -> dict[str, str]:
    """What is spread over processes or cut into segments; nothing for one process that reads its rows at once."""
    p, rows = layout.config.parallel, {}
    if layout.world > 1:
        degrees = {"dp": layout.dp, "cp": p.cp, "tp": p.tp, "pp": p.pp}
        rows["processes"] = f"{layout.world}: " + ", ".join(f"{name} {size}" for name, size in degrees.items())
    layers = max(map(len, layout.stages))
    if p.pp > 1:
        each = f", {p.stages_per_rank} on each rank" if p.stages_per_rank > 1 else ""
        rows["stages"] = "layers " + ", ".join(f"{s.start}-{s.stop - 1}" for s in layout.stages) + each
        passes = layout.micro_batches * p.stages_per_rank
        rows["pipeline"] = f"computes at best {passes / (passes + p.pp - 1):.0%} of the time"
    if p.segments > 1:
        each = f", {p.segments_per_rank} on each of {p.cp} context-parallel ranks" if p.cp > 1 else ""
        rows["segments"] = f"{p.segments} of {layout.segment_tokens:,} tokens" + each
        sizes = sorted({layout.payload(i, p.segments - 1) for i in range(layout.config.model.layers)})
        each = " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
        rows["state"] = f"{each} bytes per layer and boundary of segments"
    if p.cp > 1:
        sent = layout.micro_batches * max(layout.ring_bytes(c, s) for c in range(p.cp) for s in range(p.pp))
        busy = ring_efficiency(layers, p.cp, p.segments_per_rank, p.inflight)
        rows["ring"] = f"{sent / 2**20:,.1f} MiB from a rank in a step; computes at best {busy:.0%} of the time"
    if p.zero_stage:
        rows["ZeRO"] = f"stage {p.zero_stage} over {layout.dp * p.cp} ranks (dp x cp)"
    return rows


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = _part(name)
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def _part(name: str) -> str:
    if name.startswith(("embed_tokens", "lm_head")):
        return "embedding and head"
    for part, mark in (
        ("memory, initial weights", ".memory.weights."),
        ("memory, around it", ".memory."),
        ("attention", ".attention."),
        ("feed-forward", ".mlp."),
        ("persistent tokens", ".persistent"),
        ("memory, around it", ".retrieve_proj."),
        ("memory, around it", ".memory_queries"),
    ):
        if mark in name:
            return part
    return "norms and the rest"


def run_flops(config: Config) -> float:
    """Of all steps, as the warm-ups have them."""
    train, data = config.train, config.data
    starts = [0, *(start for start, _ in data.seq_len_warmup[1:] if start < train.steps)]
    rows = [train.rows_until(stop) - train.rows_until(start) for start, stop in zip(starts, [*starts[1:], train.steps])]
    return sum(n * data.seq_len * flops_per_token(config, data.length_at(start))[1] for n, start in zip(rows, starts))


def flops_per_token(config: Config, length: int | None = None) -> tuple[float, float]:
    """Matrix-product FLOPs of one token: (forward, a training step). In segments, recomputation runs the head again too. length:
    tokens in a row; None: data.seq_len."""
    head = 2 * config.model.dim * config.model.vocab_size
    recomputed = config.train.recompute != "none"
    layers = [layer_flops(layer, length or config.data.seq_len) for layer in config.model.layer_configs]
    training = (3 + (recomputed and needs_segments(config))) * head + sum(f.training(recomputed) for f in layers)
    return head + sum(f.forward for f in layers), training


def _data(config: Config, tokens: int) -> str:
    from titans_pretrain.data import open_manifest
    from titans_pretrain.data.storage import Folder

    if not (paths := config.data.folders):
        return "data.path is not set"
    try:
        found = sum(open_manifest(Folder(p, config.data.cache_dir)).totals("train")["tokens"] for p in paths)
    except ValueError as e:  # a plan is of use before the data is there
        return f"not read: {e}"
    return f"{found:,} training tokens: {tokens / max(1, found):.2f} epochs"
