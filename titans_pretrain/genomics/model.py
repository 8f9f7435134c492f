"""A classifier of sequences: a language model's last hidden states, pooled, and a linear head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.genomics.config import HeadConfig
from titans_pretrain.models.causal_lm import TitansForCausalLM


class Classifier(nn.Module):
    """tokens [N, T] int64 and lengths [N] -> logits [N, classes]. What follows a sequence's end is filling: the model is causal and
    the pooling leaves it out, so it has no effect."""

    def __init__(self, backbone: TitansForCausalLM, classes: int, config: HeadConfig):
        super().__init__()
        self.backbone, self.config = backbone, config
        self.head = nn.Linear(backbone.config.dim, classes)
        if config.trained == "head":
            backbone.requires_grad_(False)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        features = self.features(tokens, lengths)
        return self.head(F.dropout(features, self.config.dropout, self.training))

    def features(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The pooled hidden states, [N, dim]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.trained == "all"):
            hidden = self.backbone(tokens, output_hidden_states=True).hidden_states[-1]
        if self.config.pooling == "last":
            return hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1]
        read = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        return hidden.masked_fill(~read[..., None], 0.0).sum(1) / lengths[:, None]
