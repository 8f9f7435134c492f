"""Attention with rotary positions and persistent keys (Titans section 3.3): a sliding window, or one MAC segment."""

from torch import Tensor, nn

from titans_pretrain.config.model import ModelConfig
from titans_pretrain.kernels.attention import sliding_window_attention
from titans_pretrain.models.rotary import Rotation, rotate, without_position


class AttentionLayer(nn.Module):
    """Projections around the attention kernel. Shapes: x [B, T, dim]; keys and values [B, T, heads, head_dim]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.rotary_dim, self.window = config.heads, config.rotary_dim, config.window
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        keys: tuple[Tensor, Tensor] | None,
        by: Rotation,
        positions: Tensor | None,
        persistent: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Sliding-window attention. keys: the window's tail from the call before; persistent [P, dim]."""
        y, keys = sliding_window_attention(
            self.queries(x, by), *self.keys_values(x, by), window=self.window, positions=positions,
            persistent=self.positionless(persistent), tail=keys,
        )  # fmt: skip
        return self.merge(y), keys

    def queries(self, x: Tensor, by: Rotation) -> Tensor:
        return rotate(self._split(self.q_proj(x)), by)

    def keys_values(self, x: Tensor, by: Rotation) -> tuple[Tensor, Tensor]:
        return rotate(self._split(self.k_proj(x)), by), self._split(self.v_proj(x))

    def positionless(self, x: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Keys and values of tokens without a place in the sequence. x [..., n, dim] -> [..., n, heads, head_dim] each."""
        if x is None:
            return None
        return without_position(self._split(self.k_proj(x)), self.rotary_dim), self._split(self.v_proj(x))

    def merge(self, y: Tensor) -> Tensor:
        """[B, T, heads, head_dim] -> [B, T, dim]."""
        return self.o_proj(y.flatten(-2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))
