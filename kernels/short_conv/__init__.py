"""Short causal depthwise convolution."""

from titans_pretrain.kernels.short_conv.conv import causal_conv

__all__ = ["causal_conv"]
