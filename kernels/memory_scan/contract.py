"""The public memory scan: one contract, several backends."""

from torch import Tensor

from titans_pretrain.kernels.backends import Backend, choose, without_autocast
from titans_pretrain.kernels.memory_scan import reference
from titans_pretrain.kernels.memory_scan.checks import check_read, check_scan
from titans_pretrain.kernels.memory_scan.chunked import scan, step
from titans_pretrain.kernels.memory_scan.hidden_split import WHOLE, HiddenSplit
from titans_pretrain.kernels.memory_scan.options import ScanOptions
from titans_pretrain.kernels.memory_scan.state import MemoryState
from titans_pretrain.kernels.memory_scan.triton import entry as triton

# In the order in which "auto" tries them.
SCAN = (
    Backend("triton", triton.scan, triton.refuses_scan, triton.leaves),
    Backend("chunked", scan.scan),
    Backend("reference", reference.scan, reference.refuses),
)
STEP = (
    Backend("triton", triton.step, triton.refuses_step, triton.leaves),
    Backend("chunked", step.step),
    Backend("reference", reference.scan, reference.refuses),
)
READ = (
    Backend("triton", triton.read, triton.refuses_step, triton.leaves),
    Backend("chunked", step.read),
    Backend("reference", reference.read, reference.refuses),
)


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
    hidden_split: HiddenSplit | None = None,
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
                            z at k_t, F the rows of the last W (of the whole one); 0: the plain gradient. Without residual_norm
                            nothing is damped
    forget_to               "zero", or "initial": W_t = W_init + (1 - alpha_t)(W_{t-1} - W_init) + S_t,
                            W_init = initial_state.weights
    reset                   [B, chunks touched by this call] bool: the state returns to initial_state before that chunk
    initial_state           batch 1 or B; needed by reset and forget_to="initial". Gradients flow to it
    checkpoint_every        chunks between the states saved for the backward pass, a matter of memory and not of the function; None
                            chooses. Long chunks have more than one
    backend                 "auto", "triton" (kernels for CUDA, a table of shapes), "chunked" (dual form in torch, any device) or
                            "reference" (token loop, the oracle)
    hidden_split            how ranks meet that each hold a part of the hidden size F of memories of depth 2: states are
                            [.., D, F_rank] and [.., F_rank, D], all else is the same on every rank, outputs and the gradients
                            of q, k, v and the gates too, to the bit. One sum per tile and one per span, each way

    Returns y [B, T, H, D] in q's dtype and the state after the last token, in the state's dtype. Any T >= 1 is legal; a state
    may stop in the middle of a chunk and carries that chunk's anchor.

    Raises ValueError for arguments that do not fit. Values are looked at on a CPU only: gates out of range, a reset inside a
    half-read chunk.
    """
    options = ScanOptions(chunk_size, residual_norm, damping, forget_to)
    split = _checked(hidden_split, state)
    if state.ragged:
        raise ValueError("the rows of the state stand at offsets of their own; memory_step reads on from there")
    check_scan(q, k, v, forget, momentum, lr, state, options, reset, initial_state, checkpoint_every)
    arguments = dict(
        q=q, k=k, v=v, forget=forget, momentum=momentum, lr=lr, state=state.expand(len(q)), options=options, reset=reset,
        initial_state=initial_state and initial_state.expand(len(q)), checkpoint_every=checkpoint_every, hidden_split=split,
    )  # fmt: skip
    with without_autocast(q):
        return choose("memory_scan", SCAN, backend, arguments).run(**arguments)


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
    backend: str = "auto",
    hidden_split: HiddenSplit | None = None,
) -> tuple[Tensor, MemoryState]:
    """One token of memory_scan, for decoding: the same function and arguments, T = 1 in every shape. Rows may stand at offsets of
    their own (MemoryState.offset): each is read as it would be alone. Raises ValueError likewise."""
    options = ScanOptions(chunk_size, residual_norm, damping, forget_to)
    split = _checked(hidden_split, state)
    check_scan(q, k, v, forget, momentum, lr, state, options, None, initial_state, None)
    if q.shape[1] != 1:
        raise ValueError(f"memory_step reads one token, got q with T={q.shape[1]}; use memory_scan")
    arguments = dict(
        q=q, k=k, v=v, forget=forget, momentum=momentum, lr=lr, state=state.expand(len(q)), options=options,
        initial_state=initial_state and initial_state.expand(len(q)), hidden_split=split,
    )  # fmt: skip
    with without_autocast(q):
        return choose("memory_step", STEP, backend, arguments).run(**arguments)


def memory_read(
    q: Tensor,
    state: MemoryState,
    *,
    residual_norm: bool = False,
    backend: str = "auto",
    hidden_split: HiddenSplit | None = None,
) -> Tensor:
    """M(q) at the state's weights, no update (Titans eq. 15). q [B, T, H, D] -> [B, T, H, D] in q's dtype; computed in the
    state's, under autocast too. Arguments as memory_scan's; raises ValueError likewise."""
    split = _checked(hidden_split, state)
    check_read(q, state)
    arguments = dict(q=q, state=state.expand(len(q)), residual_norm=residual_norm, hidden_split=split)
    with without_autocast(q):
        return choose("memory_read", READ, backend, arguments).run(**arguments)


def _checked(split: HiddenSplit | None, state: MemoryState) -> HiddenSplit:
    if split is None:
        return WHOLE
    split.check(state.depth)
    return split
