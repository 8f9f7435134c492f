"""Shape of a model: plain dataclasses, no dependency beyond the standard library (they travel with an HF export)."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from titans_pretrain.config.check import at_least, check_fields, did_you_mean, positive, setting


@dataclass(frozen=True)
class Variant:
    """A kind of layer, as the rest of the package has to know it without its code."""

    block: str | type  # a file of models/ and the class in it; of a variant that lives elsewhere, the class itself
    summary: str  # of a model of such layers, for its card
    memory: bool = False  # has a neural memory, as its attribute `memory`
    attention: bool = False  # has attention, as its attribute `attention`
    segments: bool = False  # this attention is cut into segments (model.mac), not a sliding window


VARIANTS: dict[str, Variant] = {
    "lmm": Variant("blocks.LmmBlock", "a neural memory that learns while it reads, and no attention", memory=True),
    "mac": Variant(
        "mac.MacBlock", "a neural memory that learns while it reads gives context to the attention within a segment",
        memory=True, attention=True, segments=True,
    ),
    "mag": Variant(
        "blocks.MagBlock", "sliding-window attention beside a neural memory that learns while it reads and gates it",
        memory=True, attention=True,
    ),
    "mal": Variant(
        "blocks.MalBlock", "a neural memory that learns while it reads, then sliding-window attention, in every layer",
        memory=True, attention=True,
    ),
    "transformer": Variant("blocks.TransformerBlock", "the attention-only baseline of the same architecture", attention=True),
}  # fmt: skip


@dataclass(frozen=True)
class MemoryConfig:
    """Neural long-term memory (Titans section 3.1). Every field changes the function, none is a mere speed setting,
    except `backend` and `checkpoint_every`."""

    heads: int = setting(4, "independent memories in a block, each dim / heads wide")
    depth: int = setting(2, "L: layers of the memory MLP; 1 is the linear memory")
    expansion: float = setting(4.0, "hidden size of the memory MLP over its width")
    chunk_size: int = setting(16, "C: tokens whose gradients are taken at one point")
    residual_norm: bool = setting(True, "the memory is x + LN(MLP(x)) instead of MLP(x)")
    forget_to: Literal["zero", "initial"] = setting(
        "initial", "what forgetting decays the weights towards: their initial values, or zero"
    )
    damping: float = setting(1.0, "c: bounds the inner gradient through the memory's norm; 0: the plain gradient")
    step: Literal["plain", "telescoped", "relative"] = setting(
        "relative",
        "telescoped scales steps down for keys that repeat within a chunk, relative also for large values; plain does not",
    )
    step_coefficient: float | None = setting(
        None,
        "g of the telescoped step; null: 0.7 for the relative one and 1.2 for the other with residual_norm, else 2",
    )
    max_lr: float | None = setting(
        None,
        "upper end of theta, the learned inner step; null: 3.4 for the relative one and 1.6 for others with residual_norm, else 0.5",
    )
    max_momentum: float = setting(0.9, "upper end of eta, the learned momentum")
    per_layer_gates: bool = setting(False, "own gates for each layer of the memory MLP")
    conv_size: int = setting(4, "taps of the short convolution on queries, keys and values")
    backend: Literal["auto", "triton", "chunked", "reference"] = setting(
        "auto",
        "triton: kernels for CUDA; chunked: matrix products; reference: token by token; auto chooses. Speed only",
    )
    checkpoint_every: int | None = setting(
        None, "chunks between the states kept for the backward pass; null chooses. Speed only"
    )

    def __post_init__(self):
        check_fields(self, "model.memory")
        for name in ("heads", "depth", "chunk_size", "conv_size", "expansion"):
            positive("model.memory." + name, getattr(self, name))
        at_least("model.memory.damping", self.damping, 0)
        if not 0 <= self.max_momentum <= 1:
            raise ValueError(f"model.memory.max_momentum must lie in [0, 1], got {self.max_momentum}")
        for name in _FOLLOW:
            if getattr(self, name) is not None:
                at_least("model.memory." + name, getattr(self, name), 0)
        if self.checkpoint_every is not None:
            positive("model.memory.checkpoint_every", self.checkpoint_every)
        # Written down with the model, which other defaults of a later version must not change.
        object.__setattr__(self, "step_coefficient", self.telescope_coefficient)
        object.__setattr__(self, "max_lr", self.largest_lr)

    @property
    def telescope_coefficient(self) -> float:
        """g, resolved: the linear memory's curvature, or the damped norm's own."""
        if self.step_coefficient is not None:
            return self.step_coefficient
        return (0.7 if self.step == "relative" else 1.2) if self.residual_norm else 2.0

    @property
    def largest_lr(self) -> float:
        """max_lr, resolved."""
        if self.max_lr is not None:
            return self.max_lr
        return (3.4 if self.step == "relative" else 1.6) if self.residual_norm else 0.5

    def changed(self, **values) -> "MemoryConfig":
        """Another config with these values; g and max_lr follow `step` and `residual_norm` where they were left to them."""
        left = MemoryConfig(step=self.step, residual_norm=self.residual_norm)
        follow = {name: None for name in _FOLLOW if getattr(self, name) == getattr(left, name)}
        return replace(self, **follow | values)

    def widths(self, dim: int) -> list[int]:
        """Sizes between the layers of one memory of a model of width `dim`: [D, F, ..., F, D]."""
        size = dim // self.heads
        return [size, *[int(self.expansion * size)] * (self.depth - 1), size]


_FOLLOW = ("step_coefficient", "max_lr")


@dataclass(frozen=True)
class MacConfig:
    """Memory as context (Titans section 4.1)."""

    segment: int = setting(512, "tokens of an attention segment, a multiple of the chunk")
    memory_tokens: int = setting(0, "0: one retrieved token per token, seen causally; N: N learned queries per segment")
    residual: bool = setting(True, "the memory writes a token and what attention makes of it; false: only the latter")

    def __post_init__(self):
        check_fields(self, "model.mac")
        positive("model.mac.segment", self.segment)
        at_least("model.mac.memory_tokens", self.memory_tokens, 0)


# How an attention is computed: one of the backends of kernels/attention, or "auto". Speed only.
AttentionBackend = Literal["auto", "flash_attn_2", "flash_attn_3", "flash_attn_4", "aten", "flex", "sdpa", "reference"]


@dataclass(frozen=True)
class LayerConfig:
    """One layer with every value resolved: all that its block sees. `ModelConfig.layer_configs` makes them."""

    variant: str
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    window: int | None
    persistent_tokens: int
    ffn_dim: int
    rotary_percent: float
    norm_eps: float
    init_std: float  # of the projections
    residual_std: float  # of those that write to the residual stream
    attention_backend: str
    memory: MemoryConfig
    mac: MacConfig

    @property
    def has_memory(self) -> bool:
        return VARIANTS[self.variant].memory

    @property
    def has_attention(self) -> bool:
        return VARIANTS[self.variant].attention

    @property
    def has_segments(self) -> bool:
        return VARIANTS[self.variant].segments

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of an attention head, an even number."""
        return int(self.head_dim * self.rotary_percent) // 2 * 2

    @property
    def document_multiple(self) -> int:
        """A document may start at multiples of this many tokens: at a chunk of the memory, at a segment where there are any."""
        if self.has_segments:
            return self.mac.segment
        return self.memory.chunk_size if self.has_memory else 1


# What an entry of model.pattern may set for its layer.
LAYER_KEYS = (
    "variant",
    "window",
    "heads",
    "kv_heads",
    "head_dim",
    "qk_norm",
    "persistent_tokens",
    "ffn_dim",
    "memory",
    "mac",
)
SPEED_KEYS = ("attention_backend", "memory.backend", "memory.checkpoint_every")  # how a layer computes, not what


@dataclass
class ModelConfig:
    variant: str = setting(
        "mag", "lmm memory alone; mac memory as context; mag as gate; mal as layer; transformer the baseline"
    )
    pattern: list | None = setting(
        None, "layers that differ, each a variant's name or {variant: ..., ...}; repeated over layers"
    )
    dim: int = setting(256, "width of the residual stream")
    layers: int = setting(4, "blocks")
    heads: int = setting(4, "attention heads")
    kv_heads: int | None = setting(
        None, "heads of keys and values, each read by heads / kv_heads of queries; null: as many as heads"
    )
    head_dim: int | None = setting(None, "size of an attention head; null: dim / heads")
    qk_norm: bool = setting(False, "RMSNorm of each head's queries and keys before RoPE; persistent keys too")
    vocab_size: int = setting(32000, "at least the tokenizer's")
    window: int | None = setting(2048, "tokens each query sees, itself included; null: full attention")
    persistent_tokens: int = setting(16, "learned vectors that are always visible")
    ffn_dim: int | None = setting(None, "hidden size of SwiGLU; null: 8/3 of dim, rounded up to a multiple of 64")
    tie_embeddings: bool = setting(True, "the output layer is the embedding")
    rope_theta: float = setting(10000.0, "base of the rotary frequencies")
    rotary_percent: float = setting(
        0.5, "share of each attention head that RoPE rotates; persistent keys live in the rest"
    )
    norm_eps: float = setting(1e-6, "of the RMS norms")
    init_std: float | None = setting(None, "of the initial projections; null: sqrt(2 / (5 dim))")
    attention_backend: AttentionBackend = setting(
        "auto", "library that computes attention; auto takes the first that can, sdpa on a CPU. Speed only"
    )
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    mac: MacConfig = field(default_factory=MacConfig)

    def __post_init__(self):
        if isinstance(self.pattern, list | tuple):
            self.pattern = list(self.pattern)  # one's own: entries are written out below
        check_fields(self, "model")
        if self.variant not in VARIANTS:
            near = did_you_mean(self.variant, VARIANTS)
            raise ValueError(f"model.variant is {self.variant!r}; legal are {', '.join(VARIANTS)}{near}")
        for name in ("dim", "layers", "heads", "vocab_size", "rope_theta"):
            positive("model." + name, getattr(self, name))
        for name in ("kv_heads", "head_dim", "window"):
            if getattr(self, name) is not None:
                positive("model." + name, getattr(self, name))
        if self.ffn_dim is None:
            self.ffn_dim = -(-8 * self.dim // (3 * 64)) * 64
        positive("model.ffn_dim", self.ffn_dim)
        if self.init_std is None:
            self.init_std = (2 / (5 * self.dim)) ** 0.5
        positive("model.init_std", self.init_std)
        at_least("model.norm_eps", self.norm_eps, 0)
        at_least("model.persistent_tokens", self.persistent_tokens, 0)
        if not 0 < self.rotary_percent <= 1:
            raise ValueError(f"model.rotary_percent must lie in (0, 1], got {self.rotary_percent}")
        if self.pattern is None:
            self._check_layer()
        else:
            self._check_pattern()

    def _check_layer(self) -> None:
        """What must fit together in a layer; with a pattern this is asked of each entry instead."""
        layer = self._layer()
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(
                f"model.dim={self.dim} is not divisible by model.heads={self.heads}; or set model.head_dim"
            )
        if self.heads % layer.kv_heads:
            raise ValueError(f"model.heads={self.heads} is not divisible by model.kv_heads={layer.kv_heads}")
        if self.dim % self.memory.heads:
            raise ValueError(f"model.dim={self.dim} is not divisible by model.memory.heads={self.memory.heads}")
        if layer.rotary_dim < 2:
            raise ValueError(
                f"model.rotary_percent={self.rotary_percent} leaves no pair to rotate in heads of {layer.head_dim}; raise it"
            )
        if layer.has_attention and self.persistent_tokens and layer.rotary_dim == layer.head_dim:
            raise ValueError(
                "persistent keys have no position and live in the dimensions that RoPE leaves alone: "
                "set model.rotary_percent below 1 or model.persistent_tokens to 0"
            )
        if layer.has_segments and self.mac.segment % self.memory.chunk_size:
            raise ValueError(
                f"model.mac.segment={self.mac.segment} must be a multiple of model.memory.chunk_size={self.memory.chunk_size}"
            )

    def _check_pattern(self) -> None:
        if not 0 < len(self.pattern) <= self.layers:
            raise ValueError(
                f"model.pattern has {len(self.pattern)} entries; give between 1 and model.layers={self.layers}, over which it is repeated"
            )
        for i, own in enumerate(self.pattern):
            memory = self._entry(i).memory
            if isinstance(own, dict) and "memory" in own:
                changed = [n for n in _FOLLOW if n in own["memory"] or getattr(memory, n) != getattr(self.memory, n)]
                self.pattern[i] = own | {"memory": own["memory"] | {n: getattr(memory, n) for n in changed}}

    def _entry(self, i: int) -> "ModelConfig":
        """The model all of whose layers are as the pattern's i-th entry. Raises ValueError, which names the key in the entry."""
        at = f"model.pattern[{i}]"
        own: Any = self.pattern[i]
        if isinstance(own, str):
            own = {"variant": own}
        if not isinstance(own, dict):
            raise ValueError(f"{at} = {own!r}: must be the name of a variant, or a mapping with a layer's own keys")
        _check_known(at, [key for key in own if key not in SPEED_KEYS], LAYER_KEYS)
        given = [key for key in own if key not in ("memory", "mac")]
        for name in ("memory", "mac"):
            if name not in own:
                continue
            if not isinstance(own[name], dict):
                raise ValueError(f"{at}.{name} = {own[name]!r}: must be a group of keys")
            _check_known(f"{at}.{name}", own[name], [f.name for f in dataclasses.fields(getattr(self, name))])
            given += [f"{name}.{key}" for key in own[name]]
        for key in given:
            if key in SPEED_KEYS:
                raise ValueError(f"{at}.{key} says how a layer computes, not what; set model.{key}, for all layers")
        try:
            groups = {"memory": self.memory.changed(**own["memory"])} if "memory" in own else {}
            if "mac" in own:
                groups["mac"] = replace(self.mac, **own["mac"])
            return replace(self, **own | groups, pattern=None)
        except ValueError as e:
            keys = "|".join(map(re.escape, given)) or "(?!)"  # none
            told, found = re.subn(rf"\bmodel\.({keys})\b", rf"{at}.\1", str(e))
            raise ValueError(told if found else f"{told} (in {at})") from e

    def _layer(self) -> LayerConfig:
        """Any layer, of a model without a pattern."""
        same = {f.name: getattr(self, f.name) for f in dataclasses.fields(LayerConfig) if hasattr(self, f.name)}
        resolved = {
            "kv_heads": self.heads if self.kv_heads is None else self.kv_heads,
            "head_dim": self.dim // self.heads if self.head_dim is None else self.head_dim,
            "residual_std": self.init_std / (2 * self.layers) ** 0.5,
        }
        return LayerConfig(**same | resolved)

    @property
    def _period(self) -> list[LayerConfig]:
        """The layers that are repeated: the pattern's entries; `variant` without a pattern."""
        entries = [self] if self.pattern is None else [self._entry(i) for i in range(len(self.pattern))]
        return [entry._layer() for entry in entries]

    @property
    def layer_configs(self) -> tuple[LayerConfig, ...]:
        """Every layer, resolved."""
        layers = self._period
        return tuple(layers[i % len(layers)] for i in range(self.layers))

    def layer(self, i: int) -> LayerConfig:
        return self.layer_configs[i]

    @property
    def variants(self) -> tuple[str, ...]:
        """Of its layers, each once, in order."""
        return tuple(dict.fromkeys(layer.variant for layer in self._period))

    @property
    def has_memory(self) -> bool:
        """Whether any layer has."""
        return any(VARIANTS[v].memory for v in self.variants)

    @property
    def has_attention(self) -> bool:
        """Whether any layer has."""
        return any(VARIANTS[v].attention for v in self.variants)

    @property
    def document_multiple(self) -> int:
        """Documents are padded to a multiple of this many tokens, so that each starts on a chunk (on a segment) of every layer."""
        return math.lcm(*(layer.document_multiple for layer in self._period))


def _check_known(at: str, given: Iterable, legal: Sequence[str]) -> None:
    for key in given:
        if key not in legal:
            near = did_you_mean(key, legal) or f"; legal here: {', '.join(legal)}"
            raise ValueError(f"unknown key {at}.{key}{near}")
