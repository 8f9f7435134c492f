"""The adjoint of the read against autograd over chunked's read, in float64, with the writes' factors as leaves."""

import pytest
import torch
from read_twin import reads_of
from tile_cases import Case, assert_close, heads

from titans_pretrain.kernels.memory_scan.triton.call import Tables
from titans_pretrain.kernels.memory_scan.triton.read_back import read_back


@pytest.mark.parametrize(
    "depth, gates, norm, tokens, offset, to_initial",
    [
        (1, 1, False, 45, 0, False),
        (1, 1, True, 37, 21, True),
        (2, 1, True, 45, 0, False),
        (2, 1, False, 37, 21, True),
        (2, 2, True, 37, 21, True),
    ],
)
def test_read_back(depth, gates, norm, tokens, offset, to_initial):
    check(Case(tokens, offset, depth=depth, gates=gates, norm=norm, to_initial=to_initial, chunk=32), 2e-5)


def test_columns_of_depth_one():
    check(Case(20, 3, depth=1, dim=32, block=16), 2e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_bfloat16(depth):
    check(Case(37, 5, depth=depth, to_initial=True, dtype=torch.bfloat16), 2e-2)


def check(case: Case, tol: float) -> None:
    call, group = case.call, case.whole
    d_y = case.randn(*case.q.shape).to(call.dtype)
    d_q, d_k = (torch.empty(case.q.shape) for _ in range(2))
    d_tables = Tables.empty(call, group, d_y.device)
    found = read_back(
        call, group, case.tokens(), case.tables(group), case.given(group), d_y, d_q, d_k, d_tables
    )._asdict()
    names = ["d_q", "d_k", "d_p2", "d_e2", *(["x", "d_p1", "d_a", "d_e1"] if call.depth == 2 else [])]
    actual, expected = {}, {}
    for at, twin in enumerate(case.tiles):
        of_tile = reads_of(case, twin, heads(d_y.double())[:, twin.positions])
        first = at * call.tile
        rows = slice(first + twin.rows.start, first + twin.rows.stop)
        for name in names:
            whole = {"d_q": d_q, "d_k": d_k}.get(name)
            part = heads(whole)[:, twin.positions] if whole is not None else found[name][:, rows]
            if whole is None:  # rows that do not exist
                assert (
                    not found[name][:, first : rows.start].any()
                    and not found[name][:, rows.stop : first + call.tile].any()
                )
            actual.setdefault(name, []).append(part)
            expected.setdefault(name, []).append(of_tile[name])
        for i in range(call.gates):
            actual.setdefault(f"d_G{i}", []).append(d_tables.G[:, i, at, twin.rows, twin.rows].tril().flatten(1))
            actual.setdefault(f"d_read{i}", []).append(d_tables.read[:, i, at, twin.rows])
            expected.setdefault(f"d_G{i}", []).append(of_tile[f"d_G{i}"].tril().flatten(1))
            expected.setdefault(f"d_read{i}", []).append(of_tile[f"d_read{i}"])
    assert d_tables.G.isfinite().all() and d_tables.read.isfinite().all()
    for name in expected:
        assert_close(torch.cat(actual[name], 1), torch.cat(expected[name], 1), tol, name)
