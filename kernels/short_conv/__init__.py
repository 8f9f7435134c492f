"""Short causal depthwise convolution. Start with contract.py."""

from titans_pretrain.kernels.short_conv.contract import causal_conv

__all__ = ["causal_conv"]
