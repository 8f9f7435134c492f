"""The variants of a Titans block around memory and attention (Titans section 4).

Llama macro-architecture: RMSNorm -> mixer -> residual -> RMSNorm -> SwiGLU -> residual. Every block is
block(x, state, by, positions) -> (y, state'), strictly causal:

    x          [B, T, dim]
    state      LayerState of the tokens before, or None where a document starts
    by         rotations of these tokens, of each rotary_dim (rotary.py)
    positions  [B, T] of each token in its document: 0 starts one, -1 is padding; None: no document starts here
"""

import torch
from torch import Tensor, nn

from titans_pretrain.config.model import LayerConfig
from titans_pretrain.models.attention import AttentionLayer
from titans_pretrain.models.initialize import init_children
from titans_pretrain.models.memory import MemoryLayer
from titans_pretrain.models.mlp import SwiGLU
from titans_pretrain.models.norm import RMSNorm
from titans_pretrain.models.rotary import Rotations
from titans_pretrain.models.state import LayerState


class Block(nn.Module):
    """Residual and feed-forward part, common to all variants; a subclass is a mixer."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.config = config
        self.mixer_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.ffn_dim, init_std=config.init_std, out_std=config.residual_std)
        self.persistent = None
        if config.persistent_tokens:
            self.persistent = nn.Parameter(torch.randn(config.persistent_tokens, config.dim))

    def init_weights(self) -> None:
        """Every parameter anew, from torch's global random state. A subclass with parameters of its own adds them."""
        init_children(self)
        if self.persistent is not None:
            nn.init.normal_(self.persistent)

    def forward(
        self, x: Tensor, state: LayerState | None, by: Rotations, positions: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        mixed, state = self.mix(self.mixer_norm(x), state or LayerState(), by, positions)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state

    def mix(self, x: Tensor, state: LayerState, by: Rotations, positions: Tensor | None) -> tuple[Tensor, LayerState]:
        raise NotImplementedError


def build_memory(c: LayerConfig) -> MemoryLayer:
    return MemoryLayer(c.dim, c.memory, norm_eps=c.norm_eps, init_std=c.init_std, out_std=c.residual_std)


def build_attention(c: LayerConfig) -> AttentionLayer:
    return AttentionLayer(
        c.dim, c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim, qk_norm=c.qk_norm, window=c.window,
        rotary_dim=c.rotary_dim, norm_eps=c.norm_eps, init_std=c.init_std, out_std=c.residual_std,
        document_multiple=c.document_multiple, backend=c.attention_backend,
    )  # fmt: skip


class LmmBlock(Block):
    """The neural memory alone."""

    def __init__(self, config: LayerConfig):
        super().__init__(config)
        self.memory = build_memory(config)

    def mix(self, x, state, by, positions):
        y, memory = self.memory(x, state.memory, positions, self.persistent)
        return y, LayerState(memory=memory)


class TransformerBlock(Block):
    """Attention alone: the baseline."""

    def __init__(self, config: LayerConfig):
        super().__init__(config)
        self.attention = build_attention(config)

    def mix(self, x, state, by, positions):
        y, kv = self.attention(x, state.kv, by[self.attention.rotary_dim], positions, self.persistent)
        return y, LayerState(kv=kv)


class MalBlock(Block):
    """Memory as a layer (eq. 29-31): memory, then sliding-window attention, each with its norm and residual."""

    def __init__(self, config: LayerConfig):
        super().__init__(config)
        self.memory = build_memory(config)
        self.attention = build_attention(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x, state, by, positions):
        state = state or LayerState()
        y, memory = self.memory(self.mixer_norm(x), state.memory, positions, self.persistent)
        x = x + y
        y, kv = self.attention(
            self.attention_norm(x), state.kv, by[self.attention.rotary_dim], positions, self.persistent
        )
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), LayerState(memory=memory, kv=kv)


class Gate(nn.Module):
    """y o sigmoid(m), each normalised with a learned vector first: one reading of eq. 28, which prints no formula."""

    def __init__(self, dim: int, norm_eps: float):
        super().__init__()
        self.y_norm = RMSNorm(dim, norm_eps)
        self.m_norm = RMSNorm(dim, norm_eps)

    def init_weights(self) -> None:
        init_children(self)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return self.y_norm(y) * torch.sigmoid(self.m_norm(m))


class MagBlock(Block):
    """Memory as a gate (eq. 26-28): attention and memory read the same input side by side."""

    def __init__(self, config: LayerConfig):
        super().__init__(config)
        self.memory = build_memory(config)
        self.attention = build_attention(config)
        self.gate = Gate(config.dim, config.norm_eps)

    def mix(self, x, state, by, positions):
        m, memory = self.memory(x, state.memory, positions, self.persistent)
        y, kv = self.attention(x, state.kv, by[self.attention.rotary_dim], positions, self.persistent)
        return self.gate(y, m), LayerState(memory=memory, kv=kv)
