"""The adjoint of the decay tables against chunked's, in float64."""

import pytest
import torch
from tile_cases import Case, assert_close, heads

from titans_pretrain.kernels.memory_scan.chunked.tables import TableGradients, decay_tables, decay_tables_backward
from titans_pretrain.kernels.memory_scan.triton.call import Tables
from titans_pretrain.kernels.memory_scan.triton.tables_back import tables_back


@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("tokens, offset", [(32, 0), (41, 0), (37, 5), (3, 21)])
def test_tables_back(gates, tokens, offset):
    case = Case(tokens, offset, gates=gates, heads=2, forget=1.0)
    call, group = case.call, case.whole
    d_tables = Tables(*(case.randn(*x.shape) for x in Tables.empty(call, group, torch.device("cpu"))))
    expected = [torch.empty(call.n, tokens, gates, dtype=torch.float64) for _ in range(3)]
    for at, twin in enumerate(case.tiles):
        rows = twin.rows
        for d in (d_tables.G, d_tables.G.mT, d_tables.read, d_tables.last):  # rows that do not exist have no gradient
            d[..., at, : rows.start, :], d[..., at, rows.stop :, :] = 0, 0
        d = (
            d_tables.G[..., at, rows, rows],
            d_tables.read[..., at, rows, :],
            d_tables.last[..., at, rows, :],
            d_tables.carry[..., at, :3],
        )
        tables = decay_tables(*(heads(g)[:, twin.positions].mT for g in case.gates))
        gradients = decay_tables_backward(tables, TableGradients(*(x.clone() for x in d)))
        for total, part in zip(expected, gradients, strict=True):
            total[:, twin.positions] = part.mT
    found = [torch.empty_like(g, dtype=torch.float32) for g in case.gates]
    tables_back(call, group, case.tokens(), case.tables(group), Tables(*(x.float() for x in d_tables)), *found)
    for name, a, b in zip(("forget", "momentum", "lr"), found, expected, strict=True):
        assert_close(heads(a), b, 2e-5, name)
