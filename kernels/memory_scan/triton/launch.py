"""The shapes that the kernels serve, and how each is launched: a table, nothing is tuned at run time."""

from dataclasses import dataclass

MAX_TILE = 64  # tokens; a longer chunk is cut into tiles of this size


@dataclass(frozen=True)
class Kernel:
    """hidden: rows of the last matrix that a program works on at once (of the columns of the first, likewise)."""

    hidden: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Row:
    """How the kernels of one shape are launched. shared: KiB of a block's shared memory that one of them takes at most."""

    shared: int
    tables: Kernel
    state: Kernel
    read: Kernel
    read_back: Kernel
    state_back: Kernel
    tables_back: Kernel
    step: Kernel


def _row(shared: int, state: Kernel, read: Kernel, read_back: Kernel, state_back: Kernel, step: Kernel) -> Row:
    return Row(shared, Kernel(0, 8, 1), state, read, read_back, state_back, Kernel(0, 8, 1), step)


# (depth, head size D) -> row. The small heads are those of tests. What each uses: benchmarks/results/kernel_resources.md.
_TINY = _row(48, *(Kernel(16, 4, 1),) * 5)
ROWS: dict[tuple[int, int], Row] = {
    (1, 16): _TINY,
    (1, 32): _TINY,
    (1, 64): _row(48, Kernel(64, 8, 1), Kernel(64, 4, 1), Kernel(64, 4, 1), Kernel(64, 8, 1), Kernel(64, 4, 1)),
    (1, 128): _row(88, Kernel(64, 8, 1), Kernel(64, 8, 1), Kernel(64, 8, 1), Kernel(64, 8, 1), Kernel(32, 4, 1)),
    (2, 16): _TINY,
    (2, 32): _TINY,
    (2, 64): _row(80, Kernel(64, 8, 1), Kernel(32, 4, 1), Kernel(32, 4, 1), Kernel(64, 4, 1), Kernel(64, 8, 1)),
    (2, 128): _row(120, Kernel(32, 8, 1), Kernel(32, 4, 1), Kernel(32, 4, 1), Kernel(32, 8, 1), Kernel(32, 8, 1)),
}


def tile_of(chunk: int) -> int | None:
    """Tokens of a tile, or None: no tile fits such a chunk."""
    if chunk in (16, 32):
        return chunk
    return MAX_TILE if chunk % MAX_TILE == 0 else None


def row_of(depth: int, dim: int, hidden: int) -> Row | None:
    """How a memory is launched, hidden: rows of its last matrix (D where depth is 1); None: it has no row."""
    row = ROWS.get((depth, dim))
    expansion, rest = divmod(hidden, dim)
    return row if not rest and expansion in ((1,) if depth == 1 else (1, 2, 4)) else None


def shapes() -> str:
    """The table in words, for who asks for another shape."""
    dims = sorted({dim for _, dim in ROWS if dim >= 64})
    heads = " or ".join(map(str, dims))
    return f"depth 1 or 2 (expansion 1, 2 or 4), head size {heads}, chunk_size 16, 32 or a multiple of {MAX_TILE}"
