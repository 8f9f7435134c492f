"""The neural memory as a layer (Titans section 3.1): projections, short convolutions, gates, scan, norm, output gate."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.config.model import MemoryConfig
from titans_pretrain.kernels.memory_scan import (
    MemoryState,
    StepHistory,
    memory_read,
    memory_scan,
    memory_step,
    telescope,
)
from titans_pretrain.kernels.short_conv import causal_conv
from titans_pretrain.models.linear import GateProjection, Projection, small_init
from titans_pretrain.models.norm import RMSNorm
from titans_pretrain.models.state import InitialMemory, MemoryLayerState

UNIT_EPS = 1e-6  # against |x|^2
PRESENCE = 1e-4  # against the mean square, about 0.1 in a fresh model


class MemoryLayer(nn.Module):
    """Reads x [B, T, dim] into a memory of its own per head and out of it. H heads of D = dim / H, L memory layers.

    init_std, out_std: of the projections in and out; None: sqrt(2 / (5 dim)), and as in. Raises ValueError where heads do not
    divide dim.
    """

    def __init__(
        self,
        dim: int,
        config: MemoryConfig,
        *,
        norm_eps: float = 1e-6,
        init_std: float | None = None,
        out_std: float | None = None,
    ):
        super().__init__()
        if dim % config.heads:
            raise ValueError(f"dim={dim} is not divisible by heads={config.heads} of the memory")
        self.hidden_split = None  # how ranks that hold parts of the hidden size meet; set from outside
        self.config, self.heads = config, config.heads
        self.std = std = init_std or small_init(dim)
        self.q_proj = Projection(dim, dim, std)
        self.k_proj = Projection(dim, dim, std)
        self.v_proj = Projection(dim, dim, std)
        self.g_proj = Projection(dim, dim, std)  # output gate
        self.o_proj = Projection(dim, dim, out_std or std)
        self.q_conv, self.k_conv, self.v_conv = (nn.Parameter(torch.empty(dim, config.conv_size)) for _ in range(3))
        gates = config.heads * (config.depth if config.per_layer_gates else 1)
        self.forget_proj = GateProjection(dim, gates, std, bias=-6.0)
        self.momentum_proj = GateProjection(dim, gates, std, bias=0.0)
        self.lr_proj = GateProjection(dim, gates, std, bias=0.0)
        widths = config.widths(dim)
        self.norm = RMSNorm(widths[0], norm_eps)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(config.heads, rows, columns)) for rows, columns in itertools.pairwise(widths)
        )
        self._init_own()

    def init_weights(self) -> None:
        """Gates start at alpha = sigmoid(-6), and half of eta's and theta's maximum.

        With residual_norm the first and last matrix of the memory have unit entries: for keys of unit length each layer then
        adds about 2 to the curvature of a token's inner loss, so that steps of theta = 0.1 are small ones. (Entries of
        1 / sqrt(d_in) would make the last layer's 2 * d_in: through the norm, the gradient grows as the inverse of the weights.)
        """
        for name in ("q", "k", "v", "g", "o", "forget", "momentum", "lr"):
            getattr(self, name + "_proj").init_weights()
        self.norm.init_weights()
        self._init_own()

    def _init_own(self) -> None:
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            nn.init.normal_(conv, std=self.config.conv_size**-0.5)
        for w in self.weights:
            nn.init.normal_(w, std=w.shape[1] ** -0.5)
        if self.config.residual_norm:
            nn.init.normal_(self.weights[0])
            nn.init.normal_(self.weights[-1])
        else:
            nn.init.normal_(self.weights[-1], std=self.std)

    def forward(
        self,
        x: Tensor,
        state: MemoryLayerState | None = None,
        positions: Tensor | None = None,
        persistent: Tensor | None = None,
    ) -> tuple[Tensor, MemoryLayerState]:
        """state: from the call before; None starts a document. positions [B, T]: 0 starts a document, -1 is inert padding; in a state
        whose rows stand at offsets of their own (models/rows.py) no document starts, and T = 1.
        persistent [P, dim]: tokens that every document's memory has read before its first one."""
        c = self.config
        start = self.initial(persistent, state)
        if state is None:
            state = self.opened(start, x.shape[0])
        (q, k, v), (asked, said), conv = self._project(x, state.conv, positions, start.conv)
        forget, momentum, lr = self._gates(x, positions)
        offset, steps = state.memory.offset, lr * said
        forget, momentum, lr, history = self._steps(forget, momentum, steps, k, v, state.history)
        if state.memory.ragged and c.step != "plain":
            history = StepHistory.of_rows(state.history, k, steps, offset, c.chunk_size)
        options = dict(
            chunk_size=c.chunk_size, residual_norm=c.residual_norm, damping=c.damping, forget_to=c.forget_to, initial_state=start.memory,
            hidden_split=self.hidden_split,
        )  # fmt: skip
        reset = None if positions is None or state.memory.ragged else self._resets(positions, offset)
        if x.shape[1] == 1 and reset is None and (state.memory.ragged or not torch.is_grad_enabled()):
            y, memory = memory_step(q, k, v, forget, momentum, lr, state.memory, backend=c.backend, **options)
        else:
            y, memory = memory_scan(
                q, k, v, forget, momentum, lr, state.memory,
                reset=reset, checkpoint_every=c.checkpoint_every, backend=c.backend, **options,
            )  # fmt: skip
        y = (self.norm(y) * asked).flatten(-2).to(x.dtype) * torch.sigmoid(self.g_proj(x))
        kept = None if torch.is_grad_enabled() else start
        return self.o_proj(y), MemoryLayerState(memory, conv, history, kept)

    def initial(self, persistent: Tensor | None, state: MemoryLayerState | None = None) -> InitialMemory:
        """Where documents start: the learned weights after one scan of the persistent tokens [P, dim]."""
        if state is not None and state.initial is not None and not torch.is_grad_enabled():
            return state.initial
        dtype = torch.promote_types(self.weights[0].dtype, torch.float32)
        memory = MemoryState.initial(tuple(w.to(dtype) for w in self.weights), 1)
        before = self.config.conv_size - 1
        zeros = self.q_conv.new_zeros(1, before, self.q_conv.shape[0])
        learned = InitialMemory(memory, (zeros, zeros, zeros))
        if persistent is None:
            return learned
        _, after = self._scan_persistent(persistent.unsqueeze(0), learned)
        return after

    def opened(self, start: InitialMemory, batch: int) -> MemoryLayerState:
        """The state of `batch` documents before their first token."""
        return MemoryLayerState(start.memory.expand(batch), tuple(t.expand(batch, -1, -1) for t in start.conv))

    def retrieve(self, q: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """M(q) at given weights, normalised per head. q [B, n, H, D] -> [B, n, dim]."""
        q, asked = unit(q)
        state = MemoryState(weights, weights)  # the surprise is not read
        c = self.config
        y = memory_read(q, state, residual_norm=c.residual_norm, backend=c.backend, hidden_split=self.hidden_split)
        return (self.norm(y) * asked).flatten(-2)

    def _scan_persistent(self, x: Tensor, start: InitialMemory) -> tuple[Tensor, InitialMemory]:
        c = self.config
        (q, k, v), (_, said), conv = self._project(x, start.conv, None, None)
        forget, momentum, lr = self._gates(x, None)
        forget, momentum, lr, _ = self._steps(forget, momentum, lr * said, k, v, None)
        y, memory = memory_scan(
            q, k, v, forget, momentum, lr, start.memory, chunk_size=c.chunk_size, residual_norm=c.residual_norm,
            damping=c.damping, forget_to=c.forget_to, initial_state=start.memory, checkpoint_every=c.checkpoint_every, backend=c.backend,
            hidden_split=self.hidden_split,
        )  # fmt: skip
        return y, InitialMemory(memory.opened(), conv)

    def _project(self, x, tails, positions, initial):
        """q, k, v [B, T, H, D] after convolution, SiLU and the l2 norm of q and k; the presence of q and of k; and the
        convolutions' new tails."""
        heads, presence, conv = [], [], []
        for i, name in enumerate("qkv"):
            y, tail = causal_conv(
                getattr(self, f"{name}_proj")(x), getattr(self, f"{name}_conv"), tail=tails[i], positions=positions,
                initial=None if initial is None else initial[i],
            )  # fmt: skip
            y = F.silu(y).unflatten(-1, (self.heads, -1))
            if name != "v":
                y, present = unit(y)
                presence.append(present)
            heads.append(y)
            conv.append(tail)
        return heads, presence, tuple(conv)

    def _gates(self, x: Tensor, positions: Tensor | None) -> list[Tensor]:
        """alpha, eta, theta [B, T, H, G] in float32 or better; zero where positions say padding."""
        c = self.config
        gates = []
        for proj, high in ((self.forget_proj, 1.0), (self.momentum_proj, c.max_momentum), (self.lr_proj, c.largest_lr)):
            g = torch.sigmoid(proj(x)).unflatten(-1, (self.heads, -1)) * high
            if positions is not None:
                g = g.masked_fill((positions < 0)[..., None, None], 0.0)
            gates.append(g)
        return gates

    def _steps(self, forget, momentum, lr, k, v, history):
        """The gates as the scan takes them, theta telescoped and relative to v, and the history of a half-read chunk."""
        c = self.config
        if c.step != "plain":
            lr, history = telescope(
                lr, momentum, k, chunk_size=c.chunk_size, coefficient=c.telescope_coefficient,
                power=2 if c.residual_norm else 1, history=history,
            )  # fmt: skip
        if c.step == "relative" and c.residual_norm:
            # Through the norm, whose output has one length, the curvature of the inner loss grows as |v - k| does.
            lr = lr * torch.rsqrt(1 + v.to(lr.dtype).square().sum(-1, keepdim=True))
        if c.residual_norm and c.damping and c.depth > 2:
            # The input of a layer between the first and the last has a square norm of about F where the first one's, a key, has 1,
            # and so has its share of the curvature.
            shape = (*lr.shape[:-1], c.depth)
            forget, momentum, lr = forget.expand(shape), momentum.expand(shape), lr.expand(shape)
            between = lr[..., 1:-1] / self.weights[0].shape[-1]
            lr = torch.cat((lr[..., :1], between, lr[..., -1:]), -1)
        return forget, momentum, lr, history

    def _resets(self, positions: Tensor, offset: int) -> Tensor:
        """[B, chunks touched]: which chunks start a document."""
        starts = positions[:, (-offset) % self.config.chunk_size :: self.config.chunk_size] == 0
        return F.pad(starts, (1, 0)) if offset else starts


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] l2-normalised in float32 or better, and its presence [..., 1]: near 0 for a vector of no length, else 1.

    The direction of a vector near zero, and all that follows from it, changes without bound as the vector moves. Scaled by
    the presence, what it reads and writes does not: rows of zeros, as padding has them, are harmless.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    square = x.square().sum(-1, keepdim=True)
    return x * torch.rsqrt(square + UNIT_EPS), square / (square + PRESENCE * x.shape[-1])
