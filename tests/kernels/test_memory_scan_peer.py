"""Equality with titans-pytorch where both define the same function: gradients re-taken after every token.

Its loss is a mean over D, so its step is theta / D of ours. Its own networks use the exact GELU and, with a norm, a gain that is
a fast weight; it takes any network, so both sides get ours.
"""

import itertools

import pytest
import torch

from titans_pretrain.kernels.memory_scan import MemoryState, memory_scan

titans_pytorch = pytest.importorskip("titans_pytorch")

DIM, HEADS, TOKENS = 24, 3, 9


class MemoryNetwork(torch.nn.Module):
    """M of one head, with weights the peer learns while reading."""

    def __init__(self, size, depth, residual_norm):
        super().__init__()
        widths = [size, *[2 * size] * (depth - 1), size]
        self.weights = torch.nn.ParameterList(torch.randn(i, o) / i**0.5 for i, o in itertools.pairwise(widths))
        self.residual_norm = residual_norm

    def forward(self, x):
        h = x
        for i, w in enumerate(self.weights):
            h = (torch.nn.functional.gelu(h, approximate="tanh") if i else h) @ w
        return x + torch.nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6) if self.residual_norm else h


@pytest.mark.parametrize("depth, residual_norm", [(1, False), (2, False), (2, True), (3, True)])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_chunk_one_equals_titans_pytorch(depth, residual_norm, backend):
    torch.manual_seed(0)
    size = DIM // HEADS
    peer = titans_pytorch.NeuralMemory(
        dim=DIM,
        heads=HEADS,
        dim_head=size,
        chunk_size=1,
        batch_size=1,
        model=MemoryNetwork(size, depth, residual_norm),
        mem_model_norm_add_residual=False,
        default_step_transform_max_lr=0.3,
    ).double()
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    expected, _ = peer(x)

    def heads(t):
        return t.unflatten(-1, (HEADS, -1))

    written, read = peer.store_norm(x), peer.retrieve_norm(x)
    gate = {
        "forget": torch.sigmoid(peer.to_decay_factor[0](written)),
        "momentum": torch.sigmoid(peer.to_momentum[0](written)),
        "lr": torch.sigmoid(peer.to_adaptive_step[0](written)) * 0.3 / size,
    }
    weights = list(peer.memory_model_parameters)
    assert len(weights) == depth and weights[0].ndim == 3  # a learned start per head
    y, _ = memory_scan(
        heads(peer.to_queries(read)),
        heads(peer.to_keys(written)),
        heads(peer.to_values(written)),
        *(g.unsqueeze(-1) for g in gate.values()),
        MemoryState.initial(tuple(weights), 2),
        chunk_size=1,
        residual_norm=residual_norm,
        backend=backend,
    )
    y = y * torch.sigmoid(peer.retrieve_gate[0](read)).unsqueeze(-1)
    actual = peer.combine_heads(y.flatten(-2))
    d_actual, d_expected = (torch.autograd.grad(out.square().sum(), [x, *weights]) for out in (actual, expected))
    for a, b in zip(d_actual, d_expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
