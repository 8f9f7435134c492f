"""Shape of a model: plain dataclasses, no dependency beyond the standard library (they travel with an HF export)."""

from dataclasses import dataclass, field
from typing import Literal

VARIANTS = ("lmm", "mac", "mag", "mal", "transformer")
Variant = Literal["lmm", "mac", "mag", "mal", "transformer"]


@dataclass
class MemoryConfig:
    """Neural long-term memory (Titans section 3.1). Every field changes the function, none is a mere speed setting,
    except `backend` and `checkpoint_every`."""

    heads: int = 4  # independent memories per layer; head size = model.dim / heads
    depth: int = 2  # L, layers of the memory MLP; 1 is the linear memory
    expansion: float = 4.0  # hidden size of the memory MLP = expansion * head size
    chunk_size: int = 16  # C, tokens whose gradients share one anchor
    residual_norm: bool = True  # M(x) = x + LN(z) instead of M(x) = z
    forget_to: Literal["zero", "initial"] = "initial"  # what forgetting decays the weights towards
    damping: float = 0.0  # c of the damped inner gradient, with residual_norm; 0: the plain gradient
    step: Literal["plain", "telescoped"] = "plain"
    step_coefficient: float | None = None  # g of the telescoped step; null: 1.2 with residual_norm, else 2
    max_lr: float = 0.1  # theta = max_lr * sigmoid(.)
    max_momentum: float = 0.9  # eta = max_momentum * sigmoid(.)
    per_layer_gates: bool = False  # one gate per memory layer instead of one for all
    conv_size: int = 4  # taps of the short convolution on q, k, v
    backend: Literal["auto", "reference", "chunked"] = "auto"
    checkpoint_every: int | None = None  # chunks between saved states in training; None chooses

    def __post_init__(self):
        for name in ("heads", "depth", "chunk_size", "conv_size"):
            _positive("model.memory." + name, getattr(self, name))
        _positive("model.memory.expansion", self.expansion)
        for name in ("damping", "max_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.memory.{name} must be 0 or more, got {getattr(self, name)}")
        if self.step_coefficient is None:
            self.step_coefficient = 1.2 if self.residual_norm else 2.0
        if not 0 <= self.max_momentum <= 1:
            raise ValueError(f"model.memory.max_momentum must lie in [0, 1], got {self.max_momentum}")
        if self.checkpoint_every is not None:
            _positive("model.memory.checkpoint_every", self.checkpoint_every)


@dataclass
class MacConfig:
    """Memory as context (Titans section 4.1)."""

    segment: int = 512  # tokens per attention segment, a multiple of memory.chunk_size
    memory_tokens: int = 0  # 0: one retrieved token per token, seen causally; N: N learned queries per segment

    def __post_init__(self):
        _positive("model.mac.segment", self.segment)
        if self.memory_tokens < 0:
            raise ValueError(f"model.mac.memory_tokens must be 0 or more, got {self.memory_tokens}")


@dataclass
class ModelConfig:
    variant: Variant = "mag"
    dim: int = 256
    layers: int = 4
    heads: int = 4  # attention heads
    vocab_size: int = 32000
    window: int | None = 2048  # tokens each query sees, itself included; null is full attention
    persistent_tokens: int = 16
    ffn_dim: int | None = None  # SwiGLU hidden size; null: 8/3 * dim rounded up to a multiple of 64
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    rotary_percent: float = 0.5  # share of each attention head that RoPE rotates; persistent keys live in the rest
    norm_eps: float = 1e-6
    init_std: float | None = None  # of the projections; null: sqrt(2 / (5 dim)), "small init" (Nguyen and Salazar 2019)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    mac: MacConfig = field(default_factory=MacConfig)

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"model.variant is {self.variant!r}; legal are {', '.join(VARIANTS)}")
        for name in ("dim", "layers", "heads", "vocab_size"):
            _positive("model." + name, getattr(self, name))
        if self.window is not None:
            _positive("model.window", self.window)
        if self.ffn_dim is None:
            self.ffn_dim = -(-8 * self.dim // (3 * 64)) * 64
        _positive("model.ffn_dim", self.ffn_dim)
        if self.init_std is None:
            self.init_std = (2 / (5 * self.dim)) ** 0.5
        _positive("model.init_std", self.init_std)
        if self.persistent_tokens < 0:
            raise ValueError(f"model.persistent_tokens must be 0 or more, got {self.persistent_tokens}")
        if self.dim % self.heads:
            raise ValueError(f"model.dim={self.dim} is not divisible by model.heads={self.heads}")
        if self.dim % self.memory.heads:
            raise ValueError(f"model.dim={self.dim} is not divisible by model.memory.heads={self.memory.heads}")
        if not 0 < self.rotary_percent <= 1:
            raise ValueError(f"model.rotary_percent must lie in (0, 1], got {self.rotary_percent}")
        if self.rotary_dim < 2:
            raise ValueError(
                f"model.rotary_percent={self.rotary_percent} leaves no pair to rotate in heads of {self.head_dim}; raise it"
            )
        if self.has_attention and self.persistent_tokens and self.rotary_dim == self.head_dim:
            raise ValueError(
                "persistent keys have no position and live in the dimensions that RoPE leaves alone: "
                "set model.rotary_percent below 1 or model.persistent_tokens to 0"
            )
        if self.variant == "mac" and self.mac.segment % self.memory.chunk_size:
            raise ValueError(
                f"model.mac.segment={self.mac.segment} must be a multiple of model.memory.chunk_size={self.memory.chunk_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of an attention head, an even number."""
        return int(self.head_dim * self.rotary_percent) // 2 * 2

    @property
    def has_attention(self) -> bool:
        return self.variant != "lmm"

    @property
    def has_memory(self) -> bool:
        return self.variant != "transformer"

    @property
    def document_multiple(self) -> int:
        """Documents are padded to a multiple of this many tokens, so that each starts on a chunk (on a segment for mac)."""
        if self.variant == "mac":
            return self.mac.segment
        return self.memory.chunk_size if self.has_memory else 1


def _positive(key: str, value) -> None:
    if value <= 0:
        raise ValueError(f"{key} must be positive, got {value}")
