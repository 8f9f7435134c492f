"""Tensor parallelism, applied from outside to a model: which weights are cut where, and where the ranks meet.

Megatron-LM's scheme (Shoeybi et al. 2019), extended to the neural memory, whose heads are independent of each other:

    cut by output features   attention q, k, v; memory q, k, v, g and gates; MLP gate, up; mac retrieve_proj
    cut by input features    attention and memory o_proj; MLP down_proj
    cut by heads             memory.weights, q_conv, k_conv, v_conv; mac memory_queries
    cut by vocabulary        embedding, head, loss
    on every rank            norms, persistent tokens

The inner loss of a memory stays on its rank. Where one memory is too large for that, or the number of heads does not divide,
`memory_split="hidden"` cuts the hidden size of each memory instead: its projections are then on every rank, and the scan
communicates.

Communication in one pass over [B, T, dim], beside the scan's own; every sum is of that size and, with sequence parallelism, an
all-gather and a reduce-scatter of it in one direction each. Under autocast the inputs of regions are float32, outputs bfloat16:

    embedding          1 sum forward
    attention, memory  1 sum forward (o_proj) and 1 backward each; mag: 1 backward for both, as they read one input
    MLP                1 sum forward (down_proj) and 1 backward
    mac                attention and memory sum segment by segment; retrieval: 1 all-gather forward, 1 reduce-scatter backward
    memory, hidden     1 sum backward, beside the scan's: every rank has the whole gradient and gives 1 / TP of it
    head and loss      1 sum backward; for each chunk of tokens 2 sums of one or two numbers per token forward

Small gradients of what is on every rank but saw a part of the features (persistent tokens, the norm of a memory's heads) or of
the tokens (with sequence parallelism: the norms) are summed once in each backward pass.
"""

from functools import partial
from typing import Literal

from torch import nn

from titans_pretrain.kernels.cross_entropy import linear_cross_entropy
from titans_pretrain.models.causal_lm import TitansForCausalLM
from titans_pretrain.parallel.layout import check_tensor_parallel
from titans_pretrain.parallel.megatron import load_megatron
from titans_pretrain.parallel.splits import vocabulary_split
from titans_pretrain.parallel.stage import replace_parts


def shard_tensors(
    model: TitansForCausalLM, *, sequence_parallel: bool = False, memory_split: Literal["heads", "hidden"] = "heads"
) -> None:
    """Keeps this rank's slice of the weights, in place, and puts the communication in.

    Call after megatron-core's groups are up, on every rank of the tensor-parallel group alike, with the same weights of any
    floating dtype, or on the meta device. All parameters keep their names; a sharded one carries megatron-core's
    `tensor_model_parallel` and `partition_dim`. With sequence_parallel the activations between the parts of a block are
    [B, T / TP, dim], and T must be a multiple of TP. Every rank is given the same tokens and returns the same loss, or the logits
    of the whole vocabulary.

    Raises ValueError as check_tensor_parallel does.
    """
    load_megatron()
    from titans_pretrain.parallel.tensor_layers import tensor_group

    check_tensor_parallel(model.config, tensor_group().size(), sequence_parallel, memory_split)
    if tensor_group().size() > 1:
        replace_parts(model, partial(shard_part, sequence_parallel=sequence_parallel, memory_split=memory_split))
        shard_outputs(model)


def shard_part(name: str, part: nn.Module, *, sequence_parallel: bool, memory_split: str) -> nn.Module:
    """What stands for a part (models.initialize.named_parts) on this rank. See shard_tensors."""
    from titans_pretrain.parallel.tensor_blocks import enter_after, shard_block
    from titans_pretrain.parallel.tensor_layers import ColumnLinear, VocabEmbedding

    if name == "embed_tokens":
        return VocabEmbedding(part, sequence_parallel)
    if name == "lm_head":
        return ColumnLinear(part)
    if name == "norm":
        enter_after(part, sequence_parallel)
    else:
        shard_block(part, sequence_parallel, memory_split)
    return part


def shard_outputs(model: TitansForCausalLM) -> None:
    """Loss and logits of a model whose embedding and head are cut by vocabulary."""
    from titans_pretrain.parallel.tensor_layers import gather_logits, tensor_group

    model.cross_entropy = partial(linear_cross_entropy, vocabulary_split=vocabulary_split(tensor_group()))
    model.register_forward_hook(gather_logits)
