"""SwiGLU feed-forward layer, as in Llama."""

import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.models.initialize import init_children
from titans_pretrain.models.linear import Projection, small_init


class SwiGLU(nn.Module):
    """[..., dim] -> [..., dim] through ffn_dim hidden values.

    init_std, out_std: of the projections in and out; None: sqrt(2 / (5 dim)), and as in."""

    def __init__(self, dim: int, ffn_dim: int, *, init_std: float | None = None, out_std: float | None = None):
        super().__init__()
        std = init_std or small_init(dim)
        self.gate_proj = Projection(dim, ffn_dim, std)
        self.up_proj = Projection(dim, ffn_dim, std)
        self.down_proj = Projection(ffn_dim, dim, out_std or std)

    def init_weights(self) -> None:
        init_children(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
