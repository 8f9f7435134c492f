"""The adjoint of the decay tables against chunked's, in float64."""

import pytest
import torch
from tile_cases import Call, assert_close

from titans_pretrain.kernels.memory_scan.chunked.tables import TableGradients, decay_tables, decay_tables_backward
from titans_pretrain.kernels.memory_scan.triton.tables_back import tables_back

BT = 16


@pytest.mark.parametrize("gates, depth, slices", [(1, 1, 1), (1, 2, 3), (2, 2, 1)])
@pytest.mark.parametrize("tokens, offset", [(32, 0), (41, 0), (37, 5), (3, 21)])
def test_tables_back(gates, depth, slices, tokens, offset):
    call = Call(tokens, offset, BT)
    g = torch.Generator().manual_seed(tokens)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    alpha, eta, theta = (_gate(call, gates, g) for _ in range(3))
    N, tiles = call.N, len(call.tiles)
    tables = call.zeros(gates, tiles, BT, BT), call.zeros(gates, tiles, BT, 2)
    d_tables = randn(N, gates, tiles, BT, BT).tril(), randn(N, gates, tiles, BT, 2), randn(N, depth, slices, tiles, BT, 2), randn(N, depth, slices, tiles, 4)
    expected = [call.zeros(tokens, gates) for _ in range(3)]
    for tile in call.tiles:
        rows, at = tile.rows, tile.index
        twin = decay_tables(*(call.heads(x)[:, tile.positions].mT for x in (alpha, eta, theta)))
        tables[0][:, :, at, rows, rows], tables[1][:, :, at, rows] = twin.G, twin.read
        for d in d_tables[:3]:  # rows that do not exist have no gradient
            d[..., at, : rows.start, :], d[..., at, rows.stop :, :] = 0, 0
        of_layers = [d.sum(2)[:, :, at].unflatten(1, (gates, -1)).sum(2) for d in d_tables[2:]]
        d = TableGradients(d_tables[0][:, :, at, rows, rows], d_tables[1][:, :, at, rows], of_layers[0][..., rows, :], of_layers[1][..., :3])
        d = TableGradients(*(x.clone() for x in vars(d).values()))
        for total, part in zip(expected, decay_tables_backward(twin, d), strict=True):
            total[:, tile.positions] = part.mT
    found = [torch.empty_like(alpha, dtype=torch.float32) for _ in range(3)]
    tables_back(
        tuple(x.float() for x in (alpha, eta, theta)), tuple(x.float() for x in tables), tuple(x.float().contiguous() for x in d_tables),
        found, first=call.first, offset=offset,
    )  # fmt: skip
    for name, a, b in zip(("forget", "momentum", "lr"), found, expected, strict=True):
        assert_close(call.heads(a), b, 2e-5, name)


def _gate(call: Call, gates: int, g: torch.Generator) -> torch.Tensor:
    """Exact zeros and ones among others."""
    x = torch.rand(call.B, call.tokens, call.H, gates, generator=g, dtype=torch.float64)
    kind = torch.randint(0, 8, x.shape, generator=g)
    return torch.where(kind == 0, 0.0, torch.where(kind == 1, 1.0, x)).double()
