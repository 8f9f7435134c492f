"""megatron-core's tensor-parallel layers in this package's layout: activations [B, T, dim], tensors out, torch's autocast.

A region is a part of the model that works on a rank's own features. `enter` leads into it: every rank then has the whole
input, and the parts of its gradient that the ranks compute are summed there, once for all projections that read it. A
RowLinear leads out: it sums the ranks' outputs. With sequence parallelism (Korthikanti et al. 2022) a rank holds T / TP
tokens outside of regions, and both sums become gathers and reduce-scatters along T.

This file imports megatron-core: import it after `load_megatron()`.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.parallel_state import get_tensor_model_parallel_group as tensor_group
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from titans_pretrain.models.causal_lm import CausalLMOutput
from titans_pretrain.models.linear import GateProjection, linear_with_exact_bias


def enter(x: Tensor, sequence_parallel: bool = False) -> Tensor:
    """x before a region, [B, T, dim] ([B, T / TP, dim] with sequence parallelism) -> the same inside, [B, T, dim]."""
    if sequence_parallel:
        return gather_from_sequence_parallel_region(x.transpose(0, 1)).transpose(0, 1).contiguous()
    x = copy_to_tensor_model_parallel_region(x)
    if x.requires_grad:  # megatron-core sums a copy of a gradient that is not contiguous, and drops it
        x.register_hook(Tensor.contiguous)
    return x


def share(x: Tensor) -> Tensor:
    """Inside a region, the input of what every rank computes alike: each contributes 1 / TP of its gradient."""
    size = tensor_group().size()
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient / size)
    return x


def scatter(x: Tensor) -> Tensor:
    """What every rank computed alike, [B, T, dim] -> this rank's tokens [B, T / TP, dim]."""
    return scatter_to_sequence_parallel_region(x.transpose(0, 1)).transpose(0, 1).contiguous()


def gather_features(x: Tensor) -> Tensor:
    """A region's [B, T, dim / TP] -> [B, T, dim], still inside: the ranks' parts of its gradient are summed."""
    return all_gather_last_dim_from_tensor_parallel_region(x)


def gather_logits(_: nn.Module, args: tuple, output: CausalLMOutput) -> None:
    """Forward hook of a model: logits of the whole vocabulary, outside of regions."""
    if output.logits is not None:
        output.logits = gather_from_tensor_model_parallel_region(output.logits)


def sum_gradient(parameter: nn.Parameter) -> None:
    """For a parameter that every rank holds but that saw a part of the features or tokens: each backward pass sums."""

    def summed(gradient: Tensor | None) -> Tensor | None:
        if gradient is None:  # nothing reached the parameter, on no rank
            return None
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=tensor_group())
        return gradient

    parameter.register_hook(summed)


def cut(parameter: Tensor, dim: int) -> nn.Parameter:
    """This rank's piece, with megatron-core's attributes."""
    group = tensor_group()
    piece = parameter.detach().chunk(group.size(), dim)[group.rank()].clone(memory_format=torch.contiguous_format)
    piece = nn.Parameter(piece, parameter.requires_grad)
    set_tensor_model_parallel_attributes(piece, True, dim, 1)
    return piece


class ColumnLinear(ColumnParallelLinear):
    """A slice of the output features, inside a region."""

    def __init__(self, linear: nn.Linear):
        with torch.device("meta"):
            super().__init__(
                linear.in_features, linear.out_features, bias=linear.bias is not None, config=_config(),
                init_method=None, disable_grad_reduce=True,  # `enter` sums
            )  # fmt: skip
        self.weight = cut(linear.weight, 0)
        self.product = linear_with_exact_bias if isinstance(linear, GateProjection) else F.linear
        if linear.bias is not None:
            self.bias = cut(linear.bias, 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_) -> Tensor:
        return self.product(input, weight, bias)  # megatron-core's own knows CUDA's autocast only


class RowLinear(RowParallelLinear):
    """A slice of the input features; leads out of a region: [B, T, features / TP] -> [B, T, dim] (T / TP)."""

    def __init__(self, linear: nn.Linear, sequence_parallel: bool):
        assert linear.bias is None
        with torch.device("meta"):
            super().__init__(
                linear.in_features, linear.out_features, bias=False, config=_config(sequence_parallel),
                init_method=None, input_is_parallel=True, skip_bias_add=False,
            )  # fmt: skip
        self.weight = cut(linear.weight, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)[0]
        return y.transpose(0, 1).contiguous() if self.sequence_parallel else y

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: None, **_) -> Tensor:
        y = F.linear(input, weight)
        return y.transpose(0, 1) if self.sequence_parallel else y  # megatron-core scatters the first dimension


class VocabEmbedding(VocabParallelEmbedding):
    """A slice of the vocabulary: tokens [B, T] -> [B, T, dim] (T / TP with sequence parallelism)."""

    def __init__(self, embedding: nn.Embedding, sequence_parallel: bool):
        with torch.device("meta"):
            super().__init__(
                embedding.num_embeddings, embedding.embedding_dim, config=_config(sequence_parallel),
                init_method=None, reduce_scatter_embeddings=sequence_parallel,
            )  # fmt: skip
        self.weight = cut(embedding.weight, 0)

    def forward(self, tokens: Tensor) -> Tensor:
        size = self.tp_group.size()
        if self.reduce_scatter_embeddings and tokens.shape[1] % size:
            raise ValueError(
                f"parallel.sequence_parallel splits the sequence over parallel.tp={size} ranks, got {tokens.shape[1]} tokens; "
                f"give a multiple of {size}, or set parallel.sequence_parallel=false"
            )
        x = super().forward(tokens)
        return x.transpose(0, 1).contiguous() if self.reduce_scatter_embeddings else x


def _config(sequence_parallel: bool = False) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=tensor_group().size(), sequence_parallel=sequence_parallel,
        use_cpu_initialization=True, perform_initialization=False,  # the weights are there
    )  # fmt: skip
