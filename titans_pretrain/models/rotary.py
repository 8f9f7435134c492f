"""Rotary position embedding on the first dimensions of each head.

The rest of a head carries no position. Persistent and queried keys live there, so a token sees them alike at any distance and
the model is unchanged when a document is shifted.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cos and sin, each [B, T, 1, rotary_dim / 2]
Rotations = dict[int, Rotation]  # by rotary_dim: what layers with heads of different sizes need


def rotation(positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """positions [B, T] int64. Angles are taken in float64: float32 is off by 0.1 rad at two million tokens."""
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float64) / rotary_dim
    angles = positions.clamp(min=0).double()[..., None, None] * theta**-exponent
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotations(positions: Tensor, rotary_dims: Iterable[int], theta: float, dtype: torch.dtype) -> Rotations:
    """Of every rotary_dim that occurs among the layers."""
    return {dim: rotation(positions, dim, theta, dtype) for dim in dict.fromkeys(rotary_dims)}


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """x [B, T, H, D] with its first rotary_dim dimensions rotated, the halves of which are the pairs."""
    cos, sin = by
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    rotated = torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)
    return torch.cat((rotated, rest), -1)


def without_position(k: Tensor, rotary_dim: int) -> Tensor:
    """k [..., D] with zeros where RoPE rotates."""
    return torch.nn.functional.pad(k[..., rotary_dim:], (rotary_dim, 0))
