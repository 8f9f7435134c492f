"""Root-mean-square norm."""

from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's, in the weight's dtype: under bfloat16 autocast with float32 parameters the norm runs in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps=eps)

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))
