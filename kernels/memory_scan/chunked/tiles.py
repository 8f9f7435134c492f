"""What a backend computes of a tile, as a value. The walk over tiles (walk.py) is the same whoever supplies it.

BH = batch * heads, b tokens per tile, tokens [BH, b, .]. The state of a memory layer is one matrix X [BH, 2 * d_in, d_out], two
slots stacked by rows: W and S, or V = W - W_init and S when forgetting goes there: the difference is what decays, and nothing
cancels in its gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from titans_pretrain.kernels.memory_scan.chunked.network import InnerGradient
from titans_pretrain.kernels.memory_scan.chunked.tables import TileTables

Matrices = list[Tensor]  # one per memory layer


@dataclass
class Tile:
    """What a tile is computed from, besides its queries."""

    tables: list[TileTables]
    state: Matrices  # X before the tile
    gradient: InnerGradient  # of its tokens, at the chunk's anchor
    towards: Matrices | None  # W_init where forgetting goes there, [BH, d_in, d_out]


@dataclass
class StateGradients:
    """Gradients that the backward walk carries from tile to tile, changed in place."""

    state: Matrices  # of X
    anchor: Matrices | None  # of the chunk's anchor [BH, d_in, d_out]; None before anything reached it
    towards: Matrices | None  # of W_init


@dataclass(frozen=True)
class TileFunctions:
    """
    tables            gates (forget, momentum, lr), [..., b] each -> Tables
    tables_backward   Tables, TableGradients -> gradients of the gates
    inner_gradient    k, v, anchor, Network, z_L if known -> InnerGradient
    read              q, Tile -> z_L of the reads at the per-token weights [BH, b, D]; a partial sum where the memory is split
    write             Tile, out -> None: the state after the tile into `out`, which may be the tile's own state
    backward          d_y, q, z_L of the reads where it was summed, Tile, anchor, Network, d_tables, StateGradients -> gradients
                      of q, k and v; those of q and k through the weights alone, partial where the memory is split
    """

    tables: Callable
    tables_backward: Callable
    inner_gradient: Callable
    read: Callable
    write: Callable
    backward: Callable
