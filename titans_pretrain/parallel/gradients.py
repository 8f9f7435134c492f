"""Gradients over many ranks: summed over data and context parallelism, clipped by the norm of the whole model."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from titans_pretrain.models.causal_lm import TitansForCausalLM
from titans_pretrain.parallel.mesh import Axis, Mesh

BUCKET_BYTES = 128 * 2**20


def all_reduce_in_buckets(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sums each over the group, in place, in few messages."""
    bucket: list[Tensor] = []

    def reduce() -> None:
        flat = torch.cat([t.flatten() for t in bucket])
        dist.all_reduce(flat, group=group)
        for t, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(total.view_as(t))
        bucket.clear()

    for t in tensors:
        full = sum(x.nbytes for x in bucket) + t.nbytes > BUCKET_BYTES
        if bucket and (full or t.dtype != bucket[0].dtype):
            reduce()
        bucket.append(t)
    if bucket:
        reduce()


def sum_tied_gradients(model: TitansForCausalLM, pipeline: Axis) -> None:
    """A tied embedding is on the first stage and, as head, on the last: both get the sum of their gradients."""
    if pipeline.size == 1 or not model.config.tie_embeddings or model.embed_tokens is None:
        return
    weight = model.embed_tokens.weight
    kept = getattr(weight, "_hp_grad", None)  # where DeepSpeed's BF16_Optimizer accumulates in float32
    gradient = weight.grad if kept is None else kept
    other, peer = torch.empty_like(gradient), pipeline.ranks[-1 if pipeline.rank == 0 else 0]
    ways = ((dist.isend, gradient), (dist.irecv, other))
    for work in dist.batch_isend_irecv([dist.P2POp(way, x, peer, group=pipeline.group) for way, x in ways]):
        work.wait()
    gradient += other


def is_counted(name: str, p: Tensor, mesh: Mesh, tied: bool) -> bool:
    """Whether this rank's copy of a parameter counts in sums over the model (TP x PP): each value once."""
    if not getattr(p, "tensor_model_parallel", False) and mesh.tensor.rank:
        return False
    return not (tied and name == "embed_tokens.weight" and mesh.pipeline.rank == mesh.pipeline.size - 1 > 0)


def clip_by_global_norm(parameters: Iterable[tuple[str, Tensor]], mesh: Mesh, largest: float, tied: bool) -> Tensor:
    """Scales gradients so that the norm over the whole model is at most `largest`; returns the norm before, on the device."""
    parameters = [(n, p) for n, p in parameters if p.grad is not None]
    squares = [p.grad.square().sum(dtype=torch.float64) for n, p in parameters if is_counted(n, p, mesh, tied)]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=mesh.device)
    if mesh.model.size > 1:
        dist.all_reduce(total, group=mesh.model.group)
    norm = total.sqrt()
    if largest < math.inf:
        scale = (largest / (norm + 1e-6)).clamp(max=1.0)
        for _, p in parameters:
            p.grad.mul_(scale.to(p.grad.dtype))
    return norm
