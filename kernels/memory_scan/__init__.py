"""The chunked scan of the Titans neural memory. Start with scan.py (the contract); README.md has the mathematics."""

from titans_pretrain.kernels.memory_scan.scan import memory_scan, memory_step
from titans_pretrain.kernels.memory_scan.state import MemoryState
from titans_pretrain.kernels.memory_scan.step import memory_read
from titans_pretrain.kernels.memory_scan.telescope import StepHistory, telescope

__all__ = ["MemoryState", "StepHistory", "memory_read", "memory_scan", "memory_step", "telescope"]
