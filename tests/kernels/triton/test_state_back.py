"""The walk back over the states against chunked's, in float64, group by group."""

import pytest
import torch
from read_twin import reads_of
from tile_cases import Case, assert_close, heads

from titans_pretrain.kernels.memory_scan.chunked.backward import backward
from titans_pretrain.kernels.memory_scan.chunked.tables import TableGradients
from titans_pretrain.kernels.memory_scan.chunked.tiles import StateGradients
from titans_pretrain.kernels.memory_scan.triton.call import Carried, Group, Matrices, ReadGradients, Tables
from titans_pretrain.kernels.memory_scan.triton.state_back import state_back


@pytest.mark.parametrize(
    "depth, gates, block, tokens, offset, chunk, norm, to_initial",
    [
        (1, 1, 16, 45, 0, 16, False, False),
        (1, 1, 16, 60, 5, 32, True, True),
        (2, 1, 16, 45, 0, 16, True, False),
        (2, 1, 32, 60, 5, 32, False, True),
        (2, 2, 16, 27, 21, 32, True, True),
    ],
)
def test_state_back(depth, gates, block, tokens, offset, chunk, norm, to_initial):
    case = Case(
        tokens, offset, depth=depth, gates=gates, block=block, chunk=chunk, norm=norm, to_initial=to_initial, resets=offset > 0,
        damping=0.7 if to_initial else 0.0,
    )  # fmt: skip
    check(case, 2e-5)


def test_split_rows_of_depth_one():
    check(Case(40, 3, depth=1, dim=32, block=16), 2e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_bfloat16(depth):
    check(Case(37, 5, depth=depth, to_initial=True, resets=True, dtype=torch.bfloat16), 2e-2)


def check(case: Case, tol: float) -> None:
    """In two groups where the call has several chunks."""
    call, tiles = case.call, case.whole
    cut = -(-(tiles.first + 1) // (call.chunk // call.tile)) * (call.chunk // call.tile)
    groups = [tiles] if cut >= tiles.stop else [Group(tiles.first, cut), Group(cut, tiles.stop)]

    d_y = case.randn(*case.q.shape)
    after = [case.randn(*x.shape) for x in case.start]  # the gradient of the last state
    d_anchor = [case.randn(*x.shape) if call.ends_half else torch.zeros_like(x) for x in case.given_anchor]
    shapes = [x.shape for x in Tables.empty(call, tiles, d_y.device)]
    expected, d_reads = expect(case, d_y, [x.clone() for x in after], [x.clone() for x in d_anchor])

    slots = [x.float().contiguous() for joined in after for x in joined.chunk(2, 1)]
    zeros = [torch.zeros_like(x) for x in slots]
    towards = [torch.zeros_like(x) for x in slots[::2]]
    anchors = [x.float() for x in d_anchor]
    carried = Carried(
        Matrices(*slots[:2], *slots[-2:]), (anchors[0], anchors[-1]), (towards[0], towards[-1]), Matrices(*zeros[:2], *zeros[-2:])
    )  # fmt: skip
    d_k, d_v = d_reads.pop("d_k").float(), torch.empty(case.q.shape)
    found = {name: [] for name in ("last", "carry")}
    for group in reversed(groups):
        rows = slice((group.first - tiles.first) * call.tile, (group.stop - tiles.first) * call.tile)
        read = ReadGradients(
            **{n: x[:, rows].to(torch.float32 if n == "d_e2" else call.dtype).contiguous() for n, x in d_reads.items()}
        )
        d_tables = Tables.empty(call, group, d_y.device)
        state_back(call, group, case.tokens(), case.tables(group), case.given(group), read, carried, d_k, d_v, d_tables)
        found["last"].insert(0, d_tables.last)
        found["carry"].insert(0, d_tables.carry)
    found = {name: torch.cat(parts, 2) for name, parts in found.items()}
    assert [x.shape for x in found.values()] == shapes[2:]
    found |= {"d_k": d_k, "d_v": d_v}
    for layer in range(call.depth):
        pair = slots[2 * layer], slots[2 * layer + 1]
        found |= {
            f"state{layer}": torch.cat(pair, 1),
            f"anchor{layer}": anchors[layer],
            f"towards{layer}": towards[layer],
        }
        found[f"initial{layer}"] = torch.cat(zeros[2 * layer : 2 * layer + 2], 1)
    for name, value in expected.items():
        assert_close(found[name], value, tol, name)


def expect(case: Case, d_y, state, anchor) -> tuple[dict, dict]:
    """What the kernel should find, and what it is given of the reads, with d_k's part of them."""
    call, tiles = case.call, case.whole
    towards = None if case.towards is None else [torch.zeros_like(x) for x in case.towards]
    d = StateGradients(state, anchor, towards)
    initial = [torch.zeros_like(x) for x in state]
    found = {
        x: torch.zeros(s, dtype=torch.float64)
        for x, s in zip(Tables._fields, (t.shape for t in Tables.empty(call, tiles, d_y.device)))
    }
    d_k, d_v, read_k = (torch.empty(call.n, call.tokens, call.dim, dtype=torch.float64) for _ in range(3))
    inner = call.hidden if call.depth == 2 else 0
    widths = {"x": inner, "d_p1": inner, "d_p2": call.dim, "d_a": inner, "d_e1": inner, "d_e2": call.dim}
    reads = {
        name: torch.zeros(call.n, tiles.tiles * call.tile, width, dtype=torch.float64) for name, width in widths.items()
    }
    for at, twin in reversed(list(enumerate(case.tiles))):
        d_rows = heads(d_y)[:, twin.positions]
        of_reads = reads_of(case, twin, d_rows)
        rows = slice(at * call.tile + twin.rows.start, at * call.tile + twin.rows.stop)
        for name, whole in reads.items():
            if whole.shape[2]:
                whole[:, rows] = of_reads[name]
        read_k[:, twin.positions] = of_reads["d_k"]
        tables = [
            TableGradients(*(torch.zeros_like(x)[:, None, None] for x in vars(t).values())) for t in twin.tile.tables
        ]
        d_tables = [t.of_tile(0, 1)[0] for t in tables]
        q = heads(case.q)[:, twin.positions]
        _, d_k[:, twin.positions], d_v[:, twin.positions] = backward(
            d_rows, q, None, twin.tile, twin.anchor, case.network, d_tables, d
        )
        for layer, t in enumerate(d_tables):
            gate = min(layer, call.gates - 1)
            found["last"][:, gate, at, twin.rows] += t.last
            found["carry"][:, gate, at, :3] += t.carry
        if twin.opens_chunk:
            close_chunk(case, twin.chunk, d, initial)
    if call.residual_norm:
        d_k -= d_v
    lost = d.anchor is None  # the first chunk is the call's own: its anchor's gradient is in the state's
    found = {n: found[n] for n in ("last", "carry")} | {"d_k": d_k, "d_v": d_v}
    found["d_k"], found["d_v"] = (x.unflatten(0, (call.batch, call.heads)).transpose(1, 2) for x in (d_k, d_v))
    for layer in range(call.depth):
        found |= {f"state{layer}": d.state[layer], f"initial{layer}": initial[layer]}
        found[f"anchor{layer}"] = torch.zeros_like(case.given_anchor[layer]) if lost else d.anchor[layer]
        if towards is not None:
            found[f"towards{layer}"] = towards[layer]
    return found, reads | {"d_k": read_k.unflatten(0, (call.batch, call.heads)).transpose(1, 2).contiguous()}


def close_chunk(case: Case, chunk: int, d: StateGradients, initial: list) -> None:
    """As chunked's walk does."""
    for layer, anchor in enumerate(d.anchor):
        d.state[layer][:, : anchor.shape[1]] += anchor
        if d.towards is not None:
            d.towards[layer] += anchor
        row = case.rows_that_start(chunk)
        initial[layer] += d.state[layer] * row
        d.state[layer].masked_fill_(row, 0)
    d.anchor = None
