"""The pieces of the inner gradient against automatic differentiation, float64."""

import itertools

import torch
from torch.func import grad, vmap

from titans_pretrain.kernels.memory_scan.chunked.network import (
    Network,
    gelu,
    gelu_derivatives,
    inner_gradient,
    memory_network,
)
from titans_pretrain.kernels.memory_scan.hidden_split import WHOLE


def test_gelu_derivatives():
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    first, second = gelu_derivatives(z)
    torch.testing.assert_close(first, vmap(grad(gelu))(z), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(second, vmap(grad(grad(gelu)))(z), rtol=1e-12, atol=1e-13)


def test_inner_gradient_is_the_gradient():
    torch.manual_seed(0)
    k, v = torch.randn(2, 5, 6, dtype=torch.float64)
    for depth in (1, 2, 3):
        for residual_norm in (False, True):
            widths = [6, *[7 + i for i in range(depth - 1)], 6]
            weights = [
                torch.randn(i, o, dtype=torch.float64, requires_grad=True) for i, o in itertools.pairwise(widths)
            ]
            loss = (memory_network(k, weights, residual_norm, WHOLE) - v).square().sum()
            found = inner_gradient(k, v, weights, Network(residual_norm, 0.0, WHOLE))
            for w, a, e in zip(torch.autograd.grad(loss, weights), found.inputs, found.deltas, strict=True):
                torch.testing.assert_close(a.mT @ e, w, rtol=1e-10, atol=1e-11)
