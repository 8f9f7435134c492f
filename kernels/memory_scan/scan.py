"""The public memory scan: one contract, several backends."""

import logging
from functools import cache

import torch
from torch import Tensor

from titans_pretrain.kernels.memory_scan import chunked, reference
from titans_pretrain.kernels.memory_scan.hidden_split import HiddenGroup, check_split
from titans_pretrain.kernels.memory_scan.state import MemoryState
from titans_pretrain.kernels.memory_scan.step import step

logger = logging.getLogger(__name__)

BACKENDS = {"reference": reference.scan, "chunked": chunked.scan}


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor,
    momentum: Tensor,
    lr: Tensor,
    state: MemoryState,
    *,
    chunk_size: int,
    residual_norm: bool = False,
    damping: float = 0.0,
    forget_to: str = "zero",
    reset: Tensor | None = None,
    initial_state: MemoryState | None = None,
    checkpoint_every: int | None = None,
    backend: str = "auto",
    hidden_group: HiddenGroup = None,
) -> tuple[Tensor, MemoryState]:
    """Read T tokens into a batch of neural memories and out of them (Titans section 3.1 and 3.2).

    For every token t and memory layer, with u_t the gradient of |M(k_t) - v_t|^2 at the weights of t's chunk start:

        S_t = eta_t S_{t-1} - theta_t u_t                    (eq. 14, surprise with momentum)
        W_t = (1 - alpha_t) W_{t-1} + S_t                    (eq. 13, forgetting)
        y_t = M(q_t; W_t)                                    (eq. 15, read after write)

    q, k, v                 [B, T, H, D], any floating dtype
    forget, momentum, lr    alpha in [0, 1], eta in [0, 1], theta >= 0: [B, T, H, L], or [B, T, H, 1] for all memory layers
    state                   where the sequence stands (MemoryState.initial, or what an earlier call returned)
    chunk_size              C: part of the function, not a tile size. C = 1 is the paper's exact recurrence
    residual_norm           M(x) = x + LN(z) instead of z
    damping                 c of the damped inner gradient: u_t is scaled by s^2 / (s^2 + c F), s the standard deviation of
                            z at k_t, F the rows of the last W. Needs residual_norm; 0: the plain gradient
    forget_to               "zero", or "initial": W_t = W_init + (1 - alpha_t)(W_{t-1} - W_init) + S_t,
                            W_init = initial_state.weights
    reset                   [B, chunks touched by this call] bool: the state returns to initial_state before that chunk
    initial_state           batch 1 or B; needed by reset and forget_to="initial". Gradients flow to it
    checkpoint_every        chunks between the states saved for the backward pass; None: about the square root of their number, at most 32
    backend                 "auto", "reference" (token loop, the oracle) or "chunked" (dual form, hand-written backward)
    hidden_group            process group whose ranks each hold a part of the hidden size F of memories of depth 2: states are
                            [.., D, F_rank] and [.., F_rank, D], all else is the same on every rank, outputs and the gradients
                            of q, k, v and the gates too, to the bit. One all-reduce per tile and one per span, each way

    Returns y [B, T, H, D] in q's dtype and the state after the last token, in the state's dtype. Any T >= 1 is legal; a state
    may stop in the middle of a chunk and carries that chunk's anchor. Raises ValueError for arguments that do not fit.
    """
    _check(q, k, v, forget, momentum, lr, state, chunk_size, forget_to, reset, initial_state, checkpoint_every)
    check_split(hidden_group, state.depth)
    if initial_state is not None:
        initial_state = initial_state.expand(q.shape[0])
    scan = BACKENDS[_choose(backend)]
    with torch.autocast(q.device.type, enabled=False):
        if scan is reference.scan:
            dtype = state.weights[0].dtype
            q, k, v, forget, momentum, lr, out = (*(x.to(dtype) for x in (q, k, v, forget, momentum, lr)), q.dtype)
        else:
            out = q.dtype
        y, new = scan(
            q, k, v, forget, momentum, lr, state.expand(q.shape[0]),
            chunk_size=chunk_size, residual_norm=residual_norm, damping=damping, forget_to=forget_to, reset=reset,
            initial_state=initial_state, checkpoint_every=checkpoint_every, hidden_group=hidden_group,
        )  # fmt: skip
        return y.to(out), new


def memory_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor,
    momentum: Tensor,
    lr: Tensor,
    state: MemoryState,
    *,
    chunk_size: int,
    residual_norm: bool = False,
    damping: float = 0.0,
    forget_to: str = "zero",
    initial_state: MemoryState | None = None,
    hidden_group: HiddenGroup = None,
) -> tuple[Tensor, MemoryState]:
    """One token of memory_scan, for decoding: the same function, T = 1 in every shape."""
    _check(q, k, v, forget, momentum, lr, state, chunk_size, forget_to, None, initial_state, None)
    check_split(hidden_group, state.depth)
    if q.shape[1] != 1:
        raise ValueError(f"memory_step reads one token, got q with T={q.shape[1]}; use memory_scan")
    if initial_state is not None:
        initial_state = initial_state.expand(q.shape[0])
    with torch.autocast(q.device.type, enabled=False):
        return step(
            q, k, v, forget, momentum, lr, state.expand(q.shape[0]),
            chunk_size=chunk_size, residual_norm=residual_norm, damping=damping, forget_to=forget_to, initial_state=initial_state,
            hidden_group=hidden_group,
        )  # fmt: skip


def _choose(backend: str) -> str:
    if backend == "auto":
        _log_choice("chunked")
        return "chunked"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of auto, {', '.join(BACKENDS)}")
    return backend


@cache
def _log_choice(name: str) -> None:
    logger.info("memory_scan: backend %s", name)


def _check(q, k, v, forget, momentum, lr, state, chunk_size, forget_to, reset, initial_state, checkpoint_every) -> None:
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"q must be a floating point [B, T, H, D], got {q.dtype} {tuple(q.shape)}")
    batch, tokens, heads, dim = q.shape
    if tokens == 0:
        raise ValueError("memory_scan needs at least one token, got T=0")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, but q is {tuple(q.shape)}; they must agree")
    depth = state.depth
    for name, x in (("forget", forget), ("momentum", momentum), ("lr", lr)):
        if x.shape[:-1] != q.shape[:-1] or x.shape[-1] not in (1, depth):
            raise ValueError(
                f"{name} is {tuple(x.shape)}; for q {tuple(q.shape)} and {depth} memory layers it must be "
                f"{(batch, tokens, heads, depth)} or {(batch, tokens, heads, 1)}"
            )
    if not forget.shape == momentum.shape == lr.shape:
        raise ValueError(
            f"forget {tuple(forget.shape)}, momentum {tuple(momentum.shape)} and lr {tuple(lr.shape)} must have one shape"
        )
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}")
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be positive or None, got {checkpoint_every}")
    if forget_to not in ("zero", "initial"):
        raise ValueError(f"forget_to={forget_to!r} is not one of zero, initial")
    if initial_state is None and (reset is not None or forget_to == "initial"):
        raise ValueError(f"{'reset' if reset is not None else 'forget_to=initial'} needs initial_state")
    for name, s in (("state", state), ("initial_state", initial_state)):
        if s is not None:
            _check_state(name, s, batch, heads, dim, depth)
    if state.offset >= chunk_size:
        raise ValueError(
            f"the state has read {state.offset} tokens of its chunk, more than chunk_size={chunk_size} holds"
        )
    if initial_state is not None and initial_state.offset:
        raise ValueError("initial_state must stand at a chunk's start (offset 0); use initial_state.opened()")
    if reset is not None:
        chunks = -(-(state.offset + tokens) // chunk_size)
        if reset.dtype != torch.bool or reset.shape != (batch, chunks):
            raise ValueError(
                f"reset must be bool {(batch, chunks)} (batch, chunks), got {reset.dtype} {tuple(reset.shape)}"
            )
        if state.offset and reset[:, 0].any():
            raise ValueError(
                f"reset in a half-read chunk (offset {state.offset}): documents start at chunk starts only"
            )


def _check_state(name: str, state: MemoryState, batch: int, heads: int, dim: int, depth: int) -> None:
    if state.batch not in (1, batch) or state.depth != depth:
        raise ValueError(f"{name} has batch {state.batch} and depth {state.depth}; expected 1 or {batch}, and {depth}")
    width = dim
    for i, (w, s) in enumerate(zip(state.weights, state.surprise, strict=True)):
        last = i == depth - 1
        if w.shape[1:3] != (heads, width) or s.shape != w.shape or (last and w.shape[3] != dim):
            raise ValueError(
                f"{name}: memory layer {i} has weights {tuple(w.shape)} and surprise {tuple(s.shape)}; "
                f"expected [{batch}, {heads}, {width}, {dim if last else 'hidden'}]"
            )
        if w.dtype not in (torch.float32, torch.float64) or s.dtype != w.dtype:
            raise ValueError(
                f"{name}: memory layer {i} is {w.dtype} / {s.dtype}; states are float32 (float64 in tests)"
            )
        width = w.shape[3]
