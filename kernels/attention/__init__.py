"""Attention of the Titans variants: a causal sliding window, and one MAC segment. See `docs/` for the variants."""

from titans_pretrain.kernels.attention.segment import segment_attention
from titans_pretrain.kernels.attention.window import sliding_window_attention

__all__ = ["segment_attention", "sliding_window_attention"]
