"""Attention with rotary positions and persistent keys (Titans section 3.3): a sliding window, or one MAC segment."""

from torch import Tensor, nn

from titans_pretrain.kernels.attention import sliding_window_attention
from titans_pretrain.models.initialize import init_children
from titans_pretrain.models.linear import Projection, small_init
from titans_pretrain.models.norm import RMSNorm
from titans_pretrain.models.rotary import Rotation, rotate, without_position

KeysValues = tuple[Tensor, Tensor]


class AttentionLayer(nn.Module):
    """Projections around the attention kernel. Shapes: x [B, T, dim]; keys and values (kv) [B, T, kv_heads, head_dim].

    kv_heads: each is read by heads / kv_heads heads of queries (grouped-query attention, Ainslie et al. 2023); None: as many as
    heads. head_dim: None is dim / heads. qk_norm: RMSNorm of each head's queries and keys, before RoPE. window: tokens each query
    sees, itself included; None: all. rotary_dim: dimensions of a head that RoPE turns; None: half of them. init_std, out_std: of
    the projections in and out; None: sqrt(2 / (5 dim)), and as in. document_multiple: documents start this many tokens apart, or
    more. backend: of the kernel, see sliding_window_attention.

    Raises ValueError where heads do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        window: int | None = None,
        rotary_dim: int | None = None,
        norm_eps: float = 1e-6,
        init_std: float | None = None,
        out_std: float | None = None,
        document_multiple: int = 1,
        backend: str = "auto",
    ):
        super().__init__()
        if head_dim is None and dim % heads:
            raise ValueError(f"dim={dim} is not divisible by heads={heads}; or give head_dim")
        self.heads, self.kv_heads = heads, kv_heads or heads
        if heads % self.kv_heads:
            raise ValueError(f"heads={heads} is not divisible by kv_heads={kv_heads}")
        size = head_dim or dim // heads
        self.rotary_dim = size // 4 * 2 if rotary_dim is None else rotary_dim
        self.window = window
        self.document_multiple, self.backend = document_multiple, backend
        std = init_std or small_init(dim)
        self.q_proj = Projection(dim, heads * size, std)
        self.k_proj = Projection(dim, self.kv_heads * size, std)
        self.v_proj = Projection(dim, self.kv_heads * size, std)
        self.o_proj = Projection(heads * size, dim, out_std or std)
        self.q_norm, self.k_norm = None, None
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(size, norm_eps), RMSNorm(size, norm_eps)

    def init_weights(self) -> None:
        init_children(self)

    def forward(
        self,
        x: Tensor,
        kv: KeysValues | None,
        by: Rotation,
        positions: Tensor | None = None,
        persistent: Tensor | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Sliding-window attention -> y [B, T, dim] and the window's new tail. kv: the tail from the call before, None where a
        sequence starts; by: rotation(positions, rotary_dim, ...) of these tokens; persistent [P, dim]."""
        y, kv = sliding_window_attention(
            self.queries(x, by), *self.spread(self.keys_values(x, by)), window=self.window, positions=positions,
            persistent=self.spread(self.positionless(persistent)), tail=self.spread(kv),
            document_multiple=self.document_multiple, backend=self.backend,
        )  # fmt: skip
        return self.merge(y), self._gather(kv)

    def queries(self, x: Tensor, by: Rotation) -> Tensor:
        """[B, T, heads, head_dim]"""
        return rotate(_heads(self.q_proj(x), self.heads, self.q_norm), by)

    def keys_values(self, x: Tensor, by: Rotation) -> KeysValues:
        return rotate(self._keys(x), by), self._values(x)

    def positionless(self, x: Tensor | None) -> KeysValues | None:
        """Keys and values of tokens without a place in the sequence. x [..., n, dim] -> [..., n, kv_heads, head_dim] each."""
        return None if x is None else (without_position(self._keys(x), self.rotary_dim), self._values(x))

    def spread(self, kv: KeysValues | None) -> KeysValues | None:
        """One head of keys and values for each of the queries', as the kernels take them."""
        groups = self.heads // self.kv_heads
        if kv is None or groups == 1:
            return kv
        k, v = (x.repeat_interleave(groups, -2) for x in kv)
        return k, v

    def _gather(self, kv: KeysValues) -> KeysValues:
        """The inverse of `spread`, in memory of its own."""
        groups = self.heads // self.kv_heads
        return kv if groups == 1 else (kv[0][..., ::groups, :].contiguous(), kv[1][..., ::groups, :].contiguous())

    def merge(self, y: Tensor) -> Tensor:
        """[B, T, heads, head_dim] -> [B, T, dim]."""
        return self.o_proj(y.flatten(-2))

    def _keys(self, x: Tensor) -> Tensor:
        return _heads(self.k_proj(x), self.kv_heads, self.k_norm)

    def _values(self, x: Tensor) -> Tensor:
        return _heads(self.v_proj(x), self.kv_heads, None)


def _heads(x: Tensor, heads: int, norm: RMSNorm | None) -> Tensor:
    x = x.unflatten(-1, (heads, -1))
    return x if norm is None else norm(x).to(x.dtype)
