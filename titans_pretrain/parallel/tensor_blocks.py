"""The parts of a model, each cut for tensor parallelism in place: see tensor.py. Import after `load_megatron()`."""

from types import MethodType

from torch import Tensor, nn

from titans_pretrain.models.blocks import Block
from titans_pretrain.models.mac import MacBlock
from titans_pretrain.models.memory import MemoryLayer
from titans_pretrain.parallel.splits import hidden_split
from titans_pretrain.parallel.tensor_layers import (
    ColumnLinear,
    RowLinear,
    cut,
    enter,
    gather_features,
    scatter,
    share,
    sum_gradient,
    tensor_group,
)


def shard_block(block: Block, sequence_parallel: bool, memory_split: str) -> None:
    mac = isinstance(block, MacBlock)
    inside = sequence_parallel and not mac  # mac's mixer cuts the sequence itself: it works on all of it to its end
    enter_after(block.mixer_norm, sequence_parallel)
    enter_after(block.mlp_norm, sequence_parallel)
    _columns(block.mlp, "gate_proj", "up_proj")
    block.mlp.down_proj = RowLinear(block.mlp.down_proj, sequence_parallel)
    if block.persistent is not None:
        sum_gradient(block.persistent)
    if (attention := getattr(block, "attention", None)) is not None:
        _columns(attention, "q_proj", "k_proj", "v_proj")
        attention.o_proj = RowLinear(attention.o_proj, inside)
        attention.heads //= tensor_group().size()
        attention.kv_heads //= tensor_group().size()
        for norm in (attention.q_norm, attention.k_norm):  # they see this rank's heads only
            if norm is not None:
                sum_gradient(norm.weight)
    if (memory := getattr(block, "memory", None)) is not None:
        shard = {"heads": _shard_memory_heads, "hidden": _shard_memory_hidden}[memory_split]
        shard(memory, inside)
    if hasattr(block, "attention_norm"):
        enter_after(block.attention_norm, sequence_parallel)
    if mac:
        _shard_mac(block, sequence_parallel, memory_split)
    elif sequence_parallel and hasattr(block, "gate"):
        sum_gradient(block.gate.y_norm.weight)
        sum_gradient(block.gate.m_norm.weight)


def _shard_memory_heads(memory: MemoryLayer, sequence_parallel: bool) -> None:
    _columns(memory, "q_proj", "k_proj", "v_proj", "g_proj", "forget_proj", "momentum_proj", "lr_proj")
    memory.o_proj = RowLinear(memory.o_proj, sequence_parallel)
    for name in ("q_conv", "k_conv", "v_conv"):
        setattr(memory, name, cut(getattr(memory, name), 0))
    for i, w in enumerate(memory.weights):
        memory.weights[i] = cut(w, 0)
    memory.heads //= tensor_group().size()
    sum_gradient(memory.norm.weight)


def _shard_memory_hidden(memory: MemoryLayer, sequence_parallel: bool) -> None:
    """Beside its two weights the layer stays as it is: all ranks compute the same, from the same input."""
    memory.weights[0] = cut(memory.weights[0], 2)
    memory.weights[1] = cut(memory.weights[1], 1)
    memory.hidden_split = hidden_split(tensor_group())

    def shared(_, args):
        x, state, positions, *persistent = args
        return (share(x), state, positions, *(p if p is None else share(p) for p in persistent))

    memory.register_forward_pre_hook(shared)
    if sequence_parallel:
        memory.o_proj.register_forward_hook(lambda _, args, y: scatter(y))


def _shard_mac(block: MacBlock, sequence_parallel: bool, memory_split: str) -> None:
    enter_after(block.write_norm, False)
    if sequence_parallel:
        block.gate.register_forward_hook(lambda _, args, y: scatter(y))
    if memory_split == "heads":
        if block.memory_queries is None:
            _columns(block, "retrieve_proj")
        else:
            block.memory_queries = cut(block.memory_queries, 1)
    elif block.memory_queries is None:
        block.retrieve_proj.register_forward_pre_hook(lambda _, args: (share(*args),))
    # The attention's keys and values are made of all features of what is retrieved.
    spread = gather_features if memory_split == "heads" else enter

    def retrieve(memory: MemoryLayer, q: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        return spread(MemoryLayer.retrieve(memory, q, weights))

    def written(block: MacBlock, x: Tensor, y: Tensor) -> Tensor:
        return MacBlock.written(block, share(x), y)

    block.memory.retrieve = MethodType(retrieve, block.memory)
    block.written = MethodType(written, block)


def enter_after(norm: nn.Module, sequence_parallel: bool) -> None:
    norm.register_forward_hook(lambda _, args, y: enter(y, sequence_parallel))
    if sequence_parallel:
        sum_gradient(norm.weight)


def _columns(module: nn.Module, *names: str) -> None:
    for name in names:
        setattr(module, name, ColumnLinear(getattr(module, name)))
