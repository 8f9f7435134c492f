"""Bytes of tensors alive, counted on real tensors and without any data."""

import pytest
import torch
from torch.func import functional_call

from titans_pretrain.commands.dry_run import LiveBytes, without_data
from titans_pretrain.config import MacConfig, MemoryConfig, ModelConfig
from titans_pretrain.models import build_model


def test_a_storage_counts_once_while_it_is_alive():
    given = torch.zeros(100)
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        assert live.now == 4000
        c = b + given
        assert live.now == live.peak == 8000
        del a
        assert live.now == 8000  # b views it
        del b
        c.add_(1)
        assert given.view(10, 10).shape == (10, 10)
        assert (live.now, live.peak) == (4000, 8000)


def test_what_a_graph_keeps_is_alive():
    x = torch.zeros(500, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp()
        z = y.sin()
        del y
        assert live.now == 4000  # exp keeps its output, which is what sin keeps
        z.sum().backward()
        del z
        assert live.now == 2000 == x.grad.nbytes


def run(config: ModelConfig, split: bool) -> tuple[int, int, int]:
    """(kept after the forward pass, its peak, the backward pass's) of a layer."""
    with torch.device("meta"):
        model = build_model(config)
    block = model.layers[0]
    parameters = {n: torch.ones(p.shape, requires_grad=True) for n, p in block.named_parameters()}
    x = torch.ones(2, 60, config.dim, requires_grad=True)
    positions = torch.arange(60).expand(2, -1)
    by = model.rotations(positions, x.dtype)
    state = None
    with LiveBytes() as live:
        if split:
            _, state = functional_call(block, parameters, (x[:, :27], None, by_of(by, slice(27)), None))
            x, positions, by = x[:, 27:], None, by_of(by, slice(27, None))
        y, state = functional_call(block, parameters, (x, state, by, positions))
        kept, peak = live.now, live.peak
        live.peak = 0
        y.backward(torch.empty_like(y))
    return kept, peak, live.peak


def by_of(by: dict, columns: slice) -> dict:
    return {dim: tuple(t[:, columns] for t in pair) for dim, pair in by.items()}


@pytest.mark.parametrize(
    ("variant", "split", "changes"),
    [
        ("mag", False, {"chunk_size": 6, "checkpoint_every": 3}),
        ("mal", True, {}),
        pytest.param("mac", False, {"forget_to": "initial", "depth": 3}, marks=pytest.mark.slow),
    ],
)
def test_without_data_as_many_bytes_are_alive(variant, split, changes):
    """One span of each shape is walked through; real tensors walk through all."""
    memory = MemoryConfig(**{"heads": 2, "chunk_size": 3, "expansion": 2.0, **changes})
    config = ModelConfig(
        variant=variant,
        dim=16,
        layers=1,
        heads=2,
        vocab_size=32,
        window=20,
        persistent_tokens=2,
        memory=memory,
        mac=MacConfig(segment=24),
    )
    expected = run(config, split)
    with without_data():
        found = run(config, split)
    assert found == expected
