"""Whole matrices for Muon, of which a rank has a slice (tensor parallelism), a piece of a flat tensor (ZeRO), or both.

An update is orthogonal as a whole: the ranks gather it, in the dtype that the iteration would give it anyway, each makes it
orthogonal, and takes its part: what one process computes, to the bit. Nothing of it is kept between steps.
"""

from collections.abc import Iterator, Sequence
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titans_pretrain.parallel.mesh import Axis
from titans_pretrain.training import muon
from titans_pretrain.training.muon import Direction, orthogonalized, scale_of


class TensorMatrices:
    """Parameters cut over tensor-parallel ranks along their `partition_dim`. Collective over these."""

    def __init__(self, tensor: Axis):
        self.tensor = tensor

    def __call__(self, p: Tensor, update: Tensor) -> Iterator[Direction]:
        yield ..., *self.of(p, update)

    def of(self, p: Tensor, update: Tensor) -> tuple[Tensor, float]:
        """update: this rank's part. Its part of the orthogonal matrix, and the scale of the whole."""
        update = update.to(muon.DTYPE)
        if self.tensor.size == 1 or not getattr(p, "tensor_model_parallel", False):
            return orthogonalized(update), scale_of(update.shape)
        parts = [torch.empty_like(update, memory_format=torch.contiguous_format) for _ in range(self.tensor.size)]
        dist.all_gather(parts, update.contiguous(), group=self.tensor.group)
        whole = torch.cat(parts, p.partition_dim)
        return orthogonalized(whole).chunk(self.tensor.size, p.partition_dim)[self.tensor.rank], scale_of(whole.shape)


class FlatMatrices:
    """Parameters that are views of one flat tensor, of whose updates data-parallel ranks hold equal pieces: ZeRO 1 and 2. A rank
    makes those orthogonal that reach into its piece. Collective over the data-parallel group, and over tensor-parallel ranks."""

    def __init__(self, parameters: Sequence[nn.Parameter], data: Axis, tensor: Axis):
        self.data, self.slices = data, TensorMatrices(tensor)
        self.places = sorted(
            ((p.storage_offset(), p.storage_offset() + p.numel(), p) for p in parameters), key=itemgetter(0)
        )
        assert len({p.untyped_storage().data_ptr() for p in parameters}) == 1 and self.places[0][0] == 0

    def __call__(self, piece: Tensor, update: Tensor) -> Iterator[Direction]:
        first, last = (n * piece.numel() for n in (self.data.rank, self.data.rank + 1))
        device = self.places[0][2].device  # of the model; an offloaded optimizer's is another
        flat = torch.empty(self.data.size * piece.numel(), dtype=muon.DTYPE, device=device)
        dist.all_gather_into_tensor(flat, update.to(device, muon.DTYPE), group=self.data.group)
        for start, end, p in self.places:
            low, high = max(start, first), min(end, last)
            if low < high:
                direction, scale = self.slices.of(p, flat[start:end].view(p.shape))
                own = direction.flatten()[low - start : high - start]
                yield slice(low - first, high - first), own.to(piece.device), scale
