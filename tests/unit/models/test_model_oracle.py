"""Every variant against the naive model, float64: logits, loss and the gradient of every parameter.

An invariant (causality, splits, decoding) holds for any formula that is wrong everywhere alike; this is where the formulas are held.
"""

import pytest
import torch
from naive import naive_logits, naive_loss

from titans_pretrain.config.model import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.models import build_model

TOL = 1e-11
VOCAB = 11
CHUNK, SEGMENT = 3, 6


def config(variant, *, memory=None, mac=None, **options):
    """Nothing at its default: heads of attention and memory differ, epsilons and bases are large enough to be seen."""
    memory = dict(heads=3, expansion=1.5, chunk_size=CHUNK, conv_size=3, max_lr=0.7, max_momentum=0.6) | (memory or {})
    base = dict(
        dim=12, layers=1, heads=2, vocab_size=VOCAB, window=4, persistent_tokens=2, ffn_dim=10, rope_theta=50.0,
        rotary_percent=0.7, norm_eps=1e-2,
    )  # fmt: skip
    mac = MacConfig(**(dict(segment=SEGMENT) | (mac or {})))
    return ModelConfig(variant, **(base | options), memory=MemoryConfig(**memory), mac=mac)


# Packed: each row's documents, on the grid of the segments; else one document of 10 tokens.
DOCUMENTS = torch.tensor(
    [[*range(7), *[-1] * 5, *range(3)], [*range(2), *[-1] * 4, *range(9)]],
)
DAMPED = dict(damping=1.0, step="telescoped")

CASES = {
    "lmm": (config("lmm", layers=2), None),
    "lmm-packed": (config("lmm", memory=DAMPED), DOCUMENTS),
    "lmm-deep": (config("lmm", memory=dict(depth=3, per_layer_gates=True, **DAMPED)), None),
    "lmm-deep-plain": (
        config("lmm", memory=dict(depth=3, damping=0.0, step="plain", forget_to="zero"), persistent_tokens=5),
        DOCUMENTS,
    ),
    "lmm-deep-without-norm": (config("lmm", memory=dict(depth=3, residual_norm=False)), None),
    "lmm-linear": (config("lmm", memory=dict(depth=1, residual_norm=False, step="telescoped", max_lr=0.4)), DOCUMENTS),
    "lmm-gates": (config("lmm", memory=dict(per_layer_gates=True, residual_norm=False, forget_to="zero")), None),
    "lmm-chunk-1": (config("lmm", memory=dict(chunk_size=1, conv_size=4, damping=0.5, heads=1)), None),
    "mac": (config("mac", layers=2), None),
    "mac-packed": (config("mac", memory=dict(per_layer_gates=True, **DAMPED)), DOCUMENTS),
    "mac-queries": (config("mac", mac=dict(memory_tokens=2)), DOCUMENTS),
    "mac-letter": (config("mac", layers=2, mac=dict(residual=False)), DOCUMENTS),
    "mac-deep": (config("mac", mac=dict(segment=3), memory=dict(depth=3), persistent_tokens=0), DOCUMENTS),
    "mag": (config("mag", layers=2), None),
    "mag-packed": (config("mag", memory=DAMPED, tie_embeddings=False), DOCUMENTS),
    "mag-full": (config("mag", window=None, persistent_tokens=0, memory=dict(step="telescoped")), DOCUMENTS),
    "mal": (config("mal", layers=2, heads=1, memory=dict(heads=2)), None),
    "mal-packed": (config("mal", memory=dict(DAMPED, step_coefficient=2.5)), DOCUMENTS),
    "transformer": (config("transformer", layers=3), None),
    "transformer-packed": (config("transformer", layers=2, window=3), DOCUMENTS),
    "transformer-full": (
        config("transformer", window=None, persistent_tokens=0, rotary_percent=1.0, tie_embeddings=False),
        DOCUMENTS,
    ),
    "grouped": (config("transformer", heads=6, kv_heads=3, head_dim=4, qk_norm=True, layers=2), DOCUMENTS),
    "mag-grouped": (config("mag", heads=4, kv_heads=2, head_dim=6, qk_norm=True), DOCUMENTS),
    "mal-grouped": (config("mal", heads=3, kv_heads=1, memory=dict(heads=2)), None),
    "mac-grouped": (config("mac", heads=4, kv_heads=2, head_dim=5, qk_norm=True), DOCUMENTS),
    "mac-queries-grouped": (config("mac", heads=4, kv_heads=1, qk_norm=True, mac=dict(memory_tokens=3)), None),
    "hybrid": (
        config("lmm", layers=4, pattern=[{"variant": "transformer", "heads": 4}, "mag", "mal", "mac"], memory=DAMPED),
        DOCUMENTS,
    ),
    "hybrid-of-its-own": (
        config(
            "mac",
            layers=4,
            pattern=[
                {"variant": "lmm", "memory": {"depth": 1, "chunk_size": 2, "heads": 2}, "persistent_tokens": 0},
                {"variant": "mac", "qk_norm": True, "ffn_dim": 7, "mac": {"segment": 3}},
                {"variant": "transformer", "window": None, "heads": 4, "kv_heads": 2, "persistent_tokens": 3},
            ],
        ),
        DOCUMENTS,
    ),
}


def build(c: ModelConfig):
    """A float64 model away from its initialisation: gates in the middle of their range, no weight of a norm at 1."""
    torch.manual_seed(0)
    model = build_model(c).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.3 * torch.randn_like(p))
            if name.endswith("forget_proj.bias"):
                p.add_(5.0)
    return model


def documents(positions: torch.Tensor):
    """(row, slice) of each document."""
    for row, line in enumerate(positions.tolist()):
        starts = [t for t, position in enumerate(line) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(line)], strict=True):
            yield row, slice(start, start + sum(position >= 0 for position in line[start:end]))


def close(actual, expected, name=""):
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-6)
    assert error < TOL, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_equals_the_naive_model(name):
    c, positions = CASES[name]
    model = build(c)
    shape = (2, 10) if positions is None else positions.shape
    tokens, labels = torch.randint(0, VOCAB, (2, *shape), generator=torch.Generator().manual_seed(1))
    labels[0, 1] = -100
    if positions is not None:
        labels[positions < 0] = -100
    logits = model(tokens, positions=positions).logits
    loss = model(tokens, labels=labels, positions=positions).loss

    p = dict(model.named_parameters())
    total = 0
    for row, here in documents(torch.arange(10).expand(2, -1) if positions is None else positions):
        expected = naive_logits(p, c, tokens[row, here].tolist())
        close(logits[row, here], expected, "logits")
        total = total + naive_loss(expected, labels[row, here].tolist())
    total = total / (labels != -100).sum()
    close(loss, total, "loss")
    found, wanted = (torch.autograd.grad(x, list(p.values())) for x in (loss, total))
    for parameter, a, b in zip(p, found, wanted, strict=True):
        close(a, b, f"gradient of {parameter}")
