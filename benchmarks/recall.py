"""Associative recall past the attention window, and whether the memory stays finite under stress.

    python -m benchmarks.recall                                    # all settings, about half an hour
    python -m benchmarks.recall variant=mag memory.chunk_size=64   # one setting; keys of `model`

Task: 8 key-value pairs, noise, then the keys again 48 to 128 tokens later; the model names the values. Chance is 1/32; window
attention alone stays there. Stress: 4096 equal tokens, and 4096 or more random ones; the largest memory weight afterwards.
"""

import sys
import time

import torch
import torch.nn.functional as F

from titans_pretrain.config.model import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.models import build_model

KEYS, VALUES, NOISE = 32, 32, 32
VOCAB = KEYS + VALUES + NOISE
TOKENS, PAIRS, WINDOW = 128, 8, 8

SETTINGS = {
    "default": {},
    "forget to zero": {"memory.forget_to": "zero"},
    "chunk 64": {"memory.chunk_size": 64},
    "chunk 64, forget to zero": {"memory.chunk_size": 64, "memory.forget_to": "zero"},
    "theta 0.5": {"memory.max_lr": 0.5},
    "momentum to 1": {"memory.max_momentum": 1.0},
    "linear, telescoped, theta 0.5": {
        "memory.depth": 1, "memory.residual_norm": False, "memory.step": "telescoped", "memory.max_lr": 0.5,
        "memory.max_momentum": 0.0,
    },
    "linear, telescoped, theta 0.5, momentum 0.9": {
        "memory.depth": 1, "memory.residual_norm": False, "memory.step": "telescoped", "memory.max_lr": 0.5,
    },
    "mag": {"variant": "mag"},
    "transformer": {"variant": "transformer"},
}  # fmt: skip


def recall_config(**options) -> ModelConfig:
    """Two layers of width 64; options are keys of `model`, those of its memory as `memory.KEY`."""
    memory = {k.removeprefix("memory."): v for k, v in options.items() if k.startswith("memory.")}
    model = {k: v for k, v in options.items() if not k.startswith("memory.")}
    memory = MemoryConfig(**(dict(heads=2, expansion=2) | memory))
    base = dict(
        variant="lmm", dim=64, layers=2, heads=2, vocab_size=VOCAB, window=WINDOW, persistent_tokens=4, ffn_dim=128,
        mac=MacConfig(segment=max(WINDOW, memory.chunk_size)),  # its window; the default would hold a whole row
    )  # fmt: skip
    return ModelConfig(**(base | model), memory=memory)


def recall_batch(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [rows, 128]: pairs at 0-15, noise, 32 queries on even positions from 64."""
    x = torch.randint(KEYS + VALUES, VOCAB, (rows, TOKENS), generator=generator)
    y = torch.full((rows, TOKENS), -100)
    at = torch.arange(TOKENS - 64, TOKENS, 2)
    for row in range(rows):
        keys = torch.randperm(KEYS, generator=generator)[:PAIRS]
        values = torch.randint(KEYS, KEYS + VALUES, (PAIRS,), generator=generator)
        x[row, 0 : 2 * PAIRS : 2], x[row, 1 : 2 * PAIRS : 2] = keys, values
        asked = torch.randint(PAIRS, (len(at),), generator=generator)
        x[row, at], y[row, at] = keys[asked], values[asked]
    return x, y


def train(model, steps: int, *, lr: float = 3e-3, rows: int = 32, seed: int = 0, until: float = 0.995):
    """Yields (step, accuracy of the step's batch); stops once the accuracy is reached or the loss is not finite."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * min(1, step / 50)
        x, y = recall_batch(rows, generator)
        logits = model(x).logits
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        if not loss.isfinite():
            yield step, float("nan")
            return
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        asked = y != -100
        accuracy = (logits.argmax(-1)[asked] == y[asked]).float().mean().item()
        yield step, accuracy
        if accuracy > until:
            return


@torch.no_grad()
def stress(
    model, tokens: int = 4096, random_tokens: int = 4096, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Largest memory weight after `tokens` equal tokens, and after random ones; nan when an output or a weight is not finite."""
    generator = torch.Generator().manual_seed(3)
    vocab = model.config.vocab_size
    worst = []
    for x in (torch.full((1, tokens), 5), torch.randint(0, vocab, (1, random_tokens), generator=generator)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(x)
        weights = [w for layer in out.state.layers if layer.memory for w in layer.memory.memory.weights]
        finite = out.logits.isfinite().all() and all(w.isfinite().all() for w in weights)
        worst.append(max((w.abs().max().item() for w in weights), default=0.0) if finite else float("nan"))
    return worst[0], worst[1]


def main() -> None:
    chosen = SETTINGS
    if sys.argv[1:]:
        if "-h" in sys.argv or "--help" in sys.argv:
            print(__doc__)
            return
        import yaml

        pairs = [a.split("=", 1) for a in sys.argv[1:]]
        chosen = {" ".join(sys.argv[1:]): {k: yaml.safe_load(v) for k, v in pairs}}
    print("| setting | accuracy at step 200 / 400 / 800 | stress before (equal / random) | stress after | seconds |")
    print("|---|---|---|---|---|", flush=True)
    for name, options in chosen.items():
        torch.manual_seed(0)
        model = build_model(recall_config(**options))
        before, began, seen = stress(model), time.time(), {}
        for step, accuracy in train(model, 800):
            seen[step] = accuracy
        last = max(seen)
        marks = [f"{seen.get(s, seen[last]):.2f}" + ("" if s in seen else f" ({last})") for s in (200, 400, 800)]
        after = stress(model)
        cells = [name, " / ".join(marks), f"{before[0]:.2g} / {before[1]:.2g}", f"{after[0]:.2g} / {after[1]:.2g}"]
        print("| " + " | ".join(cells) + f" | {time.time() - began:.0f} |", flush=True)


if __name__ == "__main__":
    main()
