"""What defines the function of the scan, beside its tensors."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScanOptions:
    """memory_scan explains the fields. Raises ValueError for values that are not legal."""

    chunk_size: int
    residual_norm: bool = False
    damping: float = 0.0
    forget_to: str = "zero"

    def __post_init__(self):
        if not isinstance(self.chunk_size, int) or self.chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive integer, got {self.chunk_size!r}")
        if not (0 <= self.damping < math.inf):
            raise ValueError(f"damping must be 0 or more and finite, got {self.damping}")
        if self.forget_to not in ("zero", "initial"):
            raise ValueError(f"forget_to={self.forget_to!r} is not one of zero, initial")
