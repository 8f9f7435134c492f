"""What a config amounts to, before anything runs: parameters, FLOPs, memory, and steps against data."""

import itertools
import math

import torch
from torch import nn

from titans_pretrain.commands.table import format_table
from titans_pretrain.config import Config, ModelConfig
from titans_pretrain.models import build_model

# Bytes kept for the backward pass per token and model dimension, besides the feed-forward part and the memory's states:
# (fp32, bf16), counted with saved-tensor hooks (tests/integration/test_train_commands.py holds them to that).
_KEPT = {"transformer": (40, 36), "lmm": (100, 95), "mal": (128, 119), "mag": (140, 135), "mac": (275, 245)}
_KEPT_FFN = (16, 9.5)  # likewise, per token and hidden dimension of the feed-forward part


def plan(config: Config) -> str:
    """The tables as text. Reads no tokens, allocates no weights."""
    with torch.device("meta"):
        model = build_model(config.model)
    parts = parameters_by_part(model)
    total = sum(parts.values())
    forward, training = flops_per_token(config, model)
    tokens = config.train.global_batch * config.data.seq_len
    memory = memory_mib(config, total)
    return "\n\n".join(
        [
            "parameters\n" + format_table({**{k: f"{v:,}" for k, v in parts.items()}, "total": f"{total:,}"}),
            "a step\n"
            + format_table(
                {
                    "tokens": f"{tokens:,} ({config.train.global_batch} rows of {config.data.seq_len:,})",
                    "micro-batches": f"{config.train.accumulation} of {config.train.micro_batch} rows",
                    "FLOPs per token": f"{training / 1e6:,.1f} M in training, {forward / 1e6:,.1f} M forward",
                    "FLOPs": f"{training * tokens / 1e12:,.2f} T",
                }
            ),
            "memory, estimated\n" + format_table({**{k: f"{v:,.0f} MiB" for k, v in memory.items()}}),
            "the run\n"
            + format_table(
                {
                    "steps": f"{config.train.steps:,}",
                    "tokens": f"{tokens * config.train.steps:,} ({tokens * config.train.steps / total:.1f} per parameter)",
                    "FLOPs": f"{training * tokens * config.train.steps:.2e}",
                    "data": _data(config, tokens * config.train.steps),
                }
            ),
        ]
    )


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


def flops_per_token(config: Config, model: nn.Module) -> tuple[float, float]:
    """Matrix-product FLOPs of one token: (forward, a training step).

    A backward pass costs twice its forward pass; what is recomputed in it, once more: always the memory's states, and
    under train.recompute=block everything but the head.
    """
    c = config.model
    linear = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    head = 2 * c.dim * c.vocab_size
    blocks = linear - (0 if c.tie_embeddings else head) + c.layers * attention_flops(config)
    scans = c.layers * scan_flops(c) if c.has_memory else 0
    recomputed = 1 if config.train.recompute == "block" else 0
    training = 3 * head + (3 + recomputed) * blocks + (4 + recomputed) * scans
    return head + blocks + scans, training


def attention_flops(config: Config) -> float:
    """Scores and weighted sum of one token and layer, over the keys it sees on average."""
    c = config.model
    if not c.has_attention:
        return 0.0
    if c.variant == "mac":  # causal within the segment, over its tokens and what was retrieved for them
        own = (c.mac.segment + 1) / 2
        visible = own + (c.mac.memory_tokens or own)
    else:
        window = min(c.window or config.data.seq_len, config.data.seq_len)
        visible = window - window * (window - 1) / (2 * config.data.seq_len)
    retrieved = 4 * c.dim**2 if c.variant == "mac" and not c.mac.memory_tokens else 0  # their keys and values
    return 4 * c.dim * (visible + c.persistent_tokens) + retrieved


def scan_flops(c: ModelConfig) -> float:
    """One token's read, gradient and update in all memories of a layer (dual form with chunks of C tokens)."""
    size = c.dim // c.memory.heads
    hidden = int(c.memory.expansion * size)
    widths = [size, *[hidden] * (c.memory.depth - 1), size]
    weights = [a * b for a, b in itertools.pairwise(widths)]
    product = 2 * sum(weights)  # one input through one set of weights
    read = (
        3 if c.memory.forget_to == "initial" else 2
    ) * product  # weights, surprise, initial weights: decay differs by token
    gradient = product + 2 * sum(weights[1:])
    write = 2 * product  # into weights and surprise
    within_chunk = 2 * c.memory.chunk_size * (sum(widths[:-1]) + sum(widths[1:]))
    retrieve = product if c.variant == "mac" else 0
    return c.memory.heads * (read + gradient + write + within_chunk + retrieve)


def memory_mib(config: Config, parameters: int) -> dict[str, float]:
    """MiB of weights with their gradients and optimizer state, of what a micro-batch keeps for its backward pass, and both."""
    c, train = config.model, config.train
    rows, tokens = train.micro_batch, train.micro_batch * config.data.seq_len
    bf16 = train.precision == "bf16"
    block = tokens * (_KEPT[c.variant][bf16] * c.dim + _KEPT_FFN[bf16] * c.ffn_dim)
    if c.has_memory:
        size = c.dim // c.memory.heads
        chunks = math.ceil(config.data.seq_len / c.memory.chunk_size)
        saved = chunks / (c.memory.checkpoint_every or math.ceil(math.sqrt(chunks)))
        hidden = int(c.memory.expansion * size)
        state = 2 * (2 * size * hidden + (c.memory.depth - 2) * hidden**2) if c.memory.depth > 1 else 2 * size**2
        block += rows * saved * c.memory.heads * state * 4
    kept = c.layers * block if train.recompute == "none" else c.layers * tokens * c.dim * 4 + block
    fixed = 16 * parameters  # float32 weights, gradients and the two moments of AdamW
    return {name: value / 2**20 for name, value in (("weights", fixed), ("activations", kept), ("both", fixed + kept))}


def _data(config: Config, tokens: int) -> str:
    from titans_pretrain.data import open_manifest
    from titans_pretrain.data.storage import Folder

    paths = list(config.data.mixture) or ([config.data.path] if config.data.path else [])
    if not paths:
        return "data.path is not set"
    try:
        found = sum(open_manifest(Folder(p, config.data.cache_dir)).totals("train")["tokens"] for p in paths)
    except ValueError as e:  # a plan is of use before the data is there
        return f"not read: {e}"
    return f"{found:,} training tokens: {tokens / max(1, found):.2f} epochs"
