"""The chunked scan of the Titans neural memory. Start with contract.py; README.md has the mathematics."""

from titans_pretrain.kernels.memory_scan.contract import memory_read, memory_scan, memory_step
from titans_pretrain.kernels.memory_scan.hidden_split import HiddenSplit
from titans_pretrain.kernels.memory_scan.state import MemoryState
from titans_pretrain.kernels.memory_scan.telescope import StepHistory, telescope

__all__ = ["HiddenSplit", "MemoryState", "StepHistory", "memory_read", "memory_scan", "memory_step", "telescope"]
