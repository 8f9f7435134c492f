"""No kernel makes the host wait for a device: forward and backward on the meta device, whose values no one can read."""

import pytest
import torch
from no_sync import NoSync
from scan_cases import arguments, make, run, states

from titans_pretrain.kernels.attention import flash, flex, segment_attention, sliding_window_attention
from titans_pretrain.kernels.attention.libraries import LIBRARIES
from titans_pretrain.kernels.cross_entropy import linear_cross_entropy
from titans_pretrain.kernels.memory_scan import memory_read, memory_scan, memory_step, telescope
from titans_pretrain.kernels.short_conv import causal_conv


def randn(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)


def positions():
    return torch.empty(2, 150, dtype=torch.int64, device="meta")


# Each makes its inputs, and returns the call.


def scan(**options):
    x = make(150, 2, dtype=torch.float32, device="meta")
    state, initial = states(x, 2)
    size = options["chunk_size"]
    reset, later = (
        torch.empty(2, -(-(150 + offset) // size), dtype=torch.bool, device="meta") for offset in (0, 150 % size)
    )

    def call():
        y, half = memory_scan(*arguments(x), state, initial_state=initial, reset=reset, **options)
        z, _ = memory_scan(*arguments(x), half, initial_state=initial, reset=later, **options)
        return y.sum() + z.sum()

    return call


def step():
    x = make(1, 2, dtype=torch.float32, device="meta")

    def call():
        y, state = memory_step(*arguments(x), states(x, 2)[0], chunk_size=4, residual_norm=True, damping=0.7)
        return y.sum() + memory_read(x["q"], state, residual_norm=True).sum()

    return call


def telescoped():
    lr, momentum, k = randn(2, 150, 2, 1), randn(2, 150, 2, 1), randn(2, 150, 2, 6)
    return lambda: telescope(lr, momentum, k, chunk_size=16, coefficient=1.2, power=2)[0].sum()


def window(window, docs, persistent):
    q, k, v = (randn(2, 150, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    tail = tuple(randn(2, min(9, (window or 10) - 1), 2, 16, dtype=torch.bfloat16) for _ in range(2))
    pair = tuple(randn(persistent, 2, 16, dtype=torch.bfloat16) for _ in range(2)) if persistent else None
    where = positions() if docs else None
    return lambda: sliding_window_attention(q, k, v, window=window, tail=tail, persistent=pair, positions=where)[
        0
    ].sum()


def documents_by_flash():
    (library,) = (x for x in LIBRARIES if x.name == "aten")
    q = randn(2, 150, 2, 16, dtype=torch.bfloat16)
    k, v = (randn(2, 159, 2, 16, dtype=torch.bfloat16) for _ in range(2))
    pair = tuple(randn(3, 2, 16, dtype=torch.bfloat16) for _ in range(2))
    limit = positions()
    return lambda: flash.window_attention(
        q, k, v, window=32, limit=limit, persistent=pair, document_multiple=16, library=library
    ).sum()


def documents_by_flex():
    limit, x = positions(), randn(1)

    def call():
        mask = flex.window_mask(2, 150, 159, 32, limit, torch.device("meta"))
        assert mask.kv_indices.device.type == "meta"
        return x.sum()

    return call


def segment():
    tensors = [randn(2, 40, 2, 16) for _ in range(5)]
    pair, context = (tuple(randn(*shape, 2, 16) for _ in range(2)) for shape in ((3,), (2, 5)))
    return lambda: segment_attention(*tensors, persistent=pair, context=context).sum()


def conv():
    x, weight, initial, where = randn(2, 150, 8), randn(8, 4), randn(1, 3, 8), positions()
    return lambda: sum(t.sum() for t in causal_conv(x, weight, positions=where, initial=initial))


def loss():
    hidden, weight = randn(100, 8), randn(30, 8)
    labels = torch.empty(100, dtype=torch.int64, device="meta")
    return lambda: linear_cross_entropy(hidden, weight, labels, chunk_tokens=32)[0]


CALLS = {
    "scan": lambda: scan(chunk_size=16, residual_norm=True, damping=0.7, forget_to="initial"),
    "scan, linear": lambda: scan(chunk_size=67),
    "step and read": step,
    "telescope": telescoped,
    "window": lambda: window(32, True, 3),
    "window, one block": lambda: window(1000, False, 0),
    "full": lambda: window(None, True, 0),
    "documents by flash": documents_by_flash,
    "documents by flex": documents_by_flex,
    "segment": segment,
    "conv": conv,
    "cross-entropy": loss,
}


@pytest.mark.parametrize("name", CALLS)
def test_never_waits(name):
    call = CALLS[name]()
    with NoSync():
        call().backward()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x[:, [0, 1, 3]],
        lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]),
        lambda x: torch.tensor([1.0, 2.0]).to("meta"),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
    ],
)
def test_a_wait_is_found(wait):
    x = torch.ones(4, 4, device="meta")
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoSync():
        wait(x)


def test_the_call_on_a_cpu_is_checked():
    """The one check that reads a reset is for tensors whose values are at hand."""
    x = make(9, 2)
    _, half = run(x, 2, chunk_size=4)
    with pytest.raises(ValueError, match="half-read"):
        memory_scan(
            *arguments(x), half, chunk_size=4, initial_state=states(x, 2)[1], reset=torch.ones(2, 3, dtype=torch.bool)
        )
