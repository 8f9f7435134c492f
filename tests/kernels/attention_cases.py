"""Inputs of the attention kernels, and their oracle."""

import torch
from torch.testing import assert_close

HEADS, SIZE = 2, 6
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def make(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def case(tokens, *, batch=2, tail=0, persistent=0, dtype=torch.float64, seed=0, size=SIZE):
    """q, k, v and the keyword arguments of a call, all leaves."""
    row = (HEADS, size)
    q, k, v, tk, tv, pk, pv = make(
        *[(batch, tokens, *row)] * 3, *[(batch, tail, *row)] * 2, *[(persistent, *row)] * 2, dtype=dtype, seed=seed
    )
    options = {"tail": (tk, tv) if tail else None, "persistent": (pk, pv) if persistent else None}
    return (q, k, v), options


def leaves(inputs, options):
    return [*inputs, *(x for pair in options.values() if pair is not None for x in pair)]


def documents(batch, tokens, seed=0):
    """Positions of packed documents of random lengths, the first continued from the tail, some padding (-1) between."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        row = list(range(5, 5 + int(torch.randint(1, 9, (), generator=generator))))
        while len(row) < tokens:
            row += [-1] * int(torch.randint(0, 3, (), generator=generator))
            row += range(int(torch.randint(1, tokens, (), generator=generator)))
        rows.append(row[:tokens])
    return torch.tensor(rows)


def oracle(q, k, v, *, window, positions=None, persistent=None, tail=None):
    """The visibility rule of the contract written out pair by pair."""
    past = 0 if tail is None else tail[0].shape[1]
    ys = []
    for b in range(q.shape[0]):
        keys = k[b] if tail is None else torch.cat((tail[0][b], k[b]))
        values = v[b] if tail is None else torch.cat((tail[1][b], v[b]))
        rows = []
        for i in range(q.shape[1]):
            seen = []
            for j in range(-past, q.shape[1]):
                near = i - j >= 0 and (window is None or i - j < window)
                if near and (positions is None or i - j <= max(int(positions[b, i]), 0)):
                    seen.append(j + past)
            ks, vs = keys[seen], values[seen]
            if persistent is not None:
                ks, vs = torch.cat((persistent[0], ks)), torch.cat((persistent[1], vs))
            weights = (torch.einsum("hd,shd->hs", q[b, i], ks) * SIZE**-0.5).softmax(-1)
            rows.append(torch.einsum("hs,shd->hd", weights, vs))
        ys.append(torch.stack(rows))
    return torch.stack(ys)


def compare(actual, expected, inputs):
    (cotangent,) = make(actual.shape, seed=9)
    assert_close(actual, expected, **EXACT)
    grads = zip(
        torch.autograd.grad(actual, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    )
    for got, wanted in grads:
        assert_close(got, wanted, **EXACT)
