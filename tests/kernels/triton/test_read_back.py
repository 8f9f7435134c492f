"""The adjoint of the read against autograd over chunked's read, in float64, with the writes' factors as leaves."""

import pytest
import torch
from tile_cases import Case, TileTwin, assert_close, heads
from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunked.forward import read_layers
from titans_pretrain.kernels.memory_scan.chunked.network import InnerGradient, output
from titans_pretrain.kernels.memory_scan.chunked.tables import TileTables
from titans_pretrain.kernels.memory_scan.chunked.tiles import Tile
from titans_pretrain.kernels.memory_scan.triton.call import Tables
from titans_pretrain.kernels.memory_scan.triton.read_back import read_back


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def twin_of(case: Case, twin: TileTwin, d_y: Tensor) -> dict[str, Tensor]:
    """Gradients of a tile's reads with respect to all that they are computed from; those of shared gates summed."""
    call, tile = case.call, twin.tile
    q = leaf(heads(case.q)[:, twin.positions])
    sets = [(leaf(t.G), leaf(t.read)) for t in tile.tables[: call.gates]]
    tables = [TileTables(*sets[i % call.gates], t.last, t.carry) for i, t in enumerate(tile.tables)]
    inputs, deltas = [leaf(a) for a in tile.gradient.inputs], [leaf(e) for e in tile.gradient.deltas]
    gradient = InnerGradient(inputs, deltas, [], [], tile.gradient.out, None, 1.0)
    layers = read_layers(q, Tile(tables, tile.state, gradient, tile.towards))
    pre = [p for _, p in layers]
    y = output(pre[-1], q, call.residual_norm)
    leaves = {
        "d_q": q,
        "d_k": inputs[0],
        "d_a": inputs[-1],
        "d_e1": deltas[0],
        "d_e2": deltas[-1],
        "d_p1": pre[0],
        "d_p2": pre[-1],
    }
    for i, (G, read) in enumerate(sets):
        leaves |= {f"d_G{i}": G, f"d_read{i}": read}
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), d_y), strict=True))
    return {"x": layers[-1][0].detach()} | found


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("depth, gates", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("tokens, offset, to_initial", [(45, 0, False), (37, 21, True)])
def test_read_back(norm, depth, gates, tokens, offset, to_initial):
    check(Case(tokens, offset, depth=depth, gates=gates, norm=norm, to_initial=to_initial, chunk=32), 2e-5)


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
        of_tile = twin_of(case, twin, heads(d_y.double())[:, twin.positions])
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
