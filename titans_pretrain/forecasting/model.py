"""A forecaster of one variate: patches of a window -> blocks of any variant -> the values to come (Titans section 5.6)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.config.model import ModelConfig
from titans_pretrain.forecasting.config import SeriesConfig
from titans_pretrain.models.initialize import init_children
from titans_pretrain.models.linear import Projection, small_init
from titans_pretrain.models.norm import RMSNorm
from titans_pretrain.models.rotary import rotations
from titans_pretrain.models.variants import build_block

NORM_EPS = 1e-5  # of a window's variance


class Forecaster(nn.Module):
    """x [N, lookback] -> [N, horizon], each row a window of one variate.

    A window's mean and deviation are taken out and put back (reversible instance normalisation, Kim et al. 2022, without its
    learned scale: a forecaster serves all variates). The paper puts its memory in the place of Simba's Mamba and says no more;
    tokens and head are those of PatchTST (Nie et al. 2023), the linear map beside the blocks (series.linear_skip) is that of TiDE
    (Das et al. 2023)."""

    def __init__(self, model: ModelConfig, series: SeriesConfig, horizon: int):
        super().__init__()
        self.series, self.rope_theta = series, model.rope_theta
        self.in_proj = Projection(series.patch, model.dim, series.patch**-0.5)
        self.layers = nn.ModuleList(build_block(layer) for layer in model.layer_configs)
        self.norm = RMSNorm(model.dim, model.norm_eps)
        width = series.tokens * model.dim
        self.head = Projection(width, horizon, 0.0 if series.linear_skip else small_init(width))
        self.skip = Projection(series.lookback, horizon, 0.0) if series.linear_skip else None

    def init_weights(self) -> None:
        for part in (self.in_proj, self.norm, self.head, self.skip):
            if part is not None:
                part.init_weights()
        init_children(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = 0.0, 1.0
        if self.series.normalize:
            mean = x.mean(-1, keepdim=True)
            std = (x.var(-1, correction=0, keepdim=True) + NORM_EPS).sqrt()
        x = (x - mean) / std
        tokens = self.in_proj(x.unfold(-1, self.series.patch, self.series.stride))
        positions = torch.arange(tokens.shape[1], device=x.device)[None]
        dims = (layer.config.rotary_dim for layer in self.layers if layer.config.has_attention)
        by = rotations(positions, dims, self.rope_theta, torch.float32)
        for layer in self.layers:
            tokens, _ = layer(tokens, None, by, None)
        read = F.dropout(self.norm(tokens).flatten(1), self.series.head_dropout, self.training)
        forecast = self.head(read)
        if self.skip is not None:
            forecast = forecast + self.skip(x)
        return forecast * std + mean
