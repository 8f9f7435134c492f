"""Reading without writing, and one token at a time for decoding."""

from torch import Tensor

from titans_pretrain.kernels.memory_scan.hidden_split import HiddenGroup, check_split, copy_to_ranks
from titans_pretrain.kernels.memory_scan.network import damping_eps, inner_gradient, memory_network
from titans_pretrain.kernels.memory_scan.state import MemoryState


def memory_read(
    q: Tensor, state: MemoryState, *, residual_norm: bool = False, hidden_group: HiddenGroup = None
) -> Tensor:
    """M(q) at the state's weights, no update (Titans eq. 15). q [B, T, H, D] -> [B, T, H, D]. hidden_group: see memory_scan."""
    check_split(hidden_group, state.depth)
    dtype = state.weights[0].dtype
    y = memory_network(q.transpose(1, 2).to(dtype), state.weights, residual_norm, hidden_group)
    return y.transpose(1, 2).to(q.dtype)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor,
    momentum: Tensor,
    lr: Tensor,
    state: MemoryState,
    *,
    chunk_size: int,
    residual_norm: bool,
    damping: float,
    forget_to: str,
    initial_state: MemoryState | None,
    hidden_group: HiddenGroup,
) -> tuple[Tensor, MemoryState]:
    """One token: tensors as memory_scan's with T = 1. Plain operations, differentiable by autograd."""
    dtype = state.weights[0].dtype
    key, value = (x.transpose(1, 2).to(dtype) for x in (k, v))  # [B, H, 1, D]
    anchor = state.anchor or state.weights
    eps = damping_eps(damping, anchor[-1], hidden_group)
    gradient = inner_gradient(key, value, anchor, residual_norm, eps, hidden_group)
    gates = [copy_to_ranks(g, hidden_group) for g in (forget, momentum, lr)]
    weights, surprise = [], []
    for i in range(state.depth):
        alpha, eta, theta = (g[:, 0, :, min(i, g.shape[-1] - 1), None, None].to(dtype) for g in gates)
        s = eta * state.surprise[i] - theta * (gradient.inputs[i].mT @ gradient.deltas[i])
        w = (1 - alpha) * state.weights[i] + s
        if forget_to == "initial":
            w = w + alpha * initial_state.weights[i]
        weights.append(w)
        surprise.append(s)
    offset = (state.offset + 1) % chunk_size
    new = MemoryState(tuple(weights), tuple(surprise), tuple(anchor) if offset else None, offset)
    return memory_read(q, new, residual_norm=residual_norm, hidden_group=hidden_group), new
