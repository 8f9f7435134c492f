"""Attention of the Titans variants: a causal sliding window, and one MAC segment. Start with contract.py."""

from titans_pretrain.kernels.attention.contract import segment_attention, sliding_window_attention

__all__ = ["segment_attention", "sliding_window_attention"]
