"""What a prefix leaves behind for the rest of the sequence, as a value: block(x, state) -> (y, state')."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace

from torch import Tensor

from titans_pretrain.kernels.memory_scan import MemoryState, StepHistory


@dataclass(frozen=True)
class InitialMemory:
    """Where a document starts: the memory after the persistent tokens. Batch 1, a function of the parameters alone."""

    memory: MemoryState
    conv: tuple[Tensor, Tensor, Tensor]  # tails of the convolutions on q, k, v, each [1, K-1, dim]


@dataclass(frozen=True)
class MemoryLayerState:
    memory: MemoryState
    conv: tuple[Tensor, Tensor, Tensor]  # each [B, K-1, dim]
    history: StepHistory | None = None  # of a half-read chunk, telescoped steps only
    initial: InitialMemory | None = None  # kept for the next call while no gradient is wanted


@dataclass(frozen=True)
class SegmentState:
    """A half-read MAC segment of n tokens."""

    weights: tuple[Tensor, ...]  # the memory's at the segment's start: what retrieval reads
    kv: tuple[Tensor, Tensor] | None  # keys and values of the tokens, each [B, n, kv_heads, head_dim]
    retrieved: tuple[Tensor, Tensor] | None  # keys and values of the retrieved tokens, likewise
    read: Tensor | None = (
        None  # [B], of rows that stand at places of their own: how many of the n, at the end, are theirs
    )


@dataclass(frozen=True)
class LayerState:
    """State of one block; which fields are set depends on the variant. Its size does not grow with the tokens read, but up
    to the window (attention) or the segment (MAC), and with them under full attention."""

    memory: MemoryLayerState | None = None
    kv: tuple[Tensor, Tensor] | None = None  # the attention window's tail, each [B, S, kv_heads, head_dim]
    segment: SegmentState | None = None


@dataclass(frozen=True)
class ModelState:
    layers: tuple[LayerState, ...]
    position: Tensor  # [B] int64: position of the next token in its document; 0: after padding
    ragged: bool = False  # its rows have read different numbers of tokens (rows.py); it takes one token at a time

    def detach(self) -> "ModelState":
        """The same values without history: the next call's gradients stop here (truncated back-propagation)."""
        return map_tensors(Tensor.detach, self)

    def select(self, rows: Tensor) -> "ModelState":
        """The state of these rows of the batch ([n] int64), in this order: beam search, batches that shrink."""

        def pick(x: Tensor) -> Tensor:
            return x.index_select(0, rows.to(x.device))

        layers = []
        for layer in self.layers:
            kept = layer.memory and layer.memory.initial  # batch 1, the same for every row
            bare = layer if layer.memory is None else replace(layer, memory=replace(layer.memory, initial=None))
            picked = map_tensors(pick, bare)
            layers.append(picked if kept is None else replace(picked, memory=replace(picked.memory, initial=kept)))
        return ModelState(tuple(layers), pick(self.position), self.ragged)


def map_tensors(f: Callable[[Tensor], Tensor], value):
    """`value` with f applied to every tensor in it, through dataclasses and tuples."""
    if isinstance(value, Tensor):
        return f(value)
    if is_dataclass(value):
        return replace(value, **{x.name: map_tensors(f, getattr(value, x.name)) for x in fields(value)})
    if isinstance(value, tuple):
        return tuple(map_tensors(f, x) for x in value)
    return value


def tensors(value) -> list[Tensor]:
    """Every tensor in a state, in a fixed order."""
    found: list[Tensor] = []

    def collect(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_tensors(collect, value)
    return found


def positions_after(positions: Tensor | None, position: Tensor, tokens: int) -> Tensor:
    """ModelState.position after a call of `tokens` tokens."""
    return position + tokens if positions is None else positions[:, -1].clamp(min=-1) + 1
