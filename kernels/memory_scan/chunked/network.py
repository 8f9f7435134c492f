"""The memory network M and the gradient of its inner objective.

Shapes: ... leading batch dimensions, b tokens, D head size, F hidden size, L layers; weights over L of [..., d_in, d_out].

    h_0 = x;  h_l = gelu_tanh(h_{l-1} W_l) for l < L;  z = h_{L-1} W_L;  M(x) = z, or x + LN(z) with residual_norm
    inner objective: |M(k) - v|^2, summed over D (Titans eq. 12)

The gradient with respect to W_l is the outer product a_{l-1} (x) e_l of the layer's input and its delta. Where the memory is
split over ranks, the weights are this rank's part of F (hidden_split.py).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.kernels.memory_scan.hidden_split import HiddenSplit
from titans_pretrain.kernels.memory_scan.options import ScanOptions

LN_EPS = 1e-6
SQRT_2_OVER_PI = 0.7978845608028654
CUBIC = 0.044715


@dataclass(frozen=True)
class Network:
    """M, and how the gradient of its inner objective is taken.

    eps: of the damped inner gradient, damping times the rows of the whole last matrix (README.md); 0 without residual_norm
    """

    residual_norm: bool
    eps: float
    split: HiddenSplit

    @staticmethod
    def of(options: ScanOptions, weights, split: HiddenSplit) -> "Network":
        """weights: those of a memory, or a rank's part of them."""
        hidden = weights[-1].shape[-2] * split.ranks
        return Network(options.residual_norm, options.damping * hidden if options.residual_norm else 0.0, split)


def gelu(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def gelu_vjp(g: Tensor, z: Tensor) -> Tensor:
    """g * gelu'(z)."""
    return torch.ops.aten.gelu_backward(g, z, approximate="tanh")


def gelu_derivatives(z: Tensor) -> tuple[Tensor, Tensor]:
    """gelu'(z) and gelu''(z) of the tanh form.

    With u = c (z + 0.044715 z^3), t = tanh u, s = 1 - t^2:  gelu' = (1 + t) / 2 + z s u' / 2,  gelu'' = s (2 u' - c - z t u'^2).
    """
    c = SQRT_2_OVER_PI
    square = z * z
    slope = square.mul(3 * CUBIC * c).add_(c)  # u'
    t = square.mul_(CUBIC * c).add_(c).mul_(z).tanh_()
    s = torch.rsub(t * t, 1)
    first = torch.addcmul(t.mul(0.5).add_(0.5), s * z, slope, value=0.5)
    second = t.mul_(z).mul_(slope).mul_(slope).neg_().add_(slope, alpha=2).sub_(c).mul_(s)
    return first, second


def layer_norm(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised z, mean and 1 / std; over the last dimension, no affine."""
    return torch.native_layer_norm(z, z.shape[-1:], None, None, LN_EPS)


def layer_norm_vjp(g: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The norm's Jacobian, which is symmetric, times g."""
    mean, rstd = mean.contiguous(), rstd.contiguous()  # the operator reads them as dense, whatever their strides
    backward = torch.ops.aten.native_layer_norm_backward
    return backward(g, z, z.shape[-1:], mean, rstd, None, None, [True, False, False])[0]


def memory_network(x: Tensor, weights, residual_norm: bool, split: HiddenSplit) -> Tensor:
    """M(x) at the given weights. x [..., b, D], weights over L of [..., d_in, d_out] -> [..., b, D]."""
    h = split.copy(x)
    for w in weights[:-1]:
        h = gelu(h @ w)
    return output(split.sum(h @ weights[-1]), x, residual_norm)


def output(z: Tensor, x: Tensor, residual_norm: bool) -> Tensor:
    return x + layer_norm(z)[0] if residual_norm else z


@dataclass
class InnerGradient:
    """What the gradient of the inner objective leaves, per token: u_l = a_{l-1} (x) e_l."""

    inputs: list[Tensor]  # a_0 = k, a_1, ..., a_{L-1}
    deltas: list[Tensor]  # e_1, ..., e_L
    pre: list[Tensor]  # z_1, ..., z_{L-1}: what the activations saw
    back: list[Tensor]  # g_1, ..., g_{L-1}: e_{l+1} W_{l+1}^T
    out: Tensor  # z_L
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None  # LN(z_L), mean, rstd, and 2 (M(k) - v)
    damp: Tensor | float  # s^2 / (s^2 + eps), s the std of z_L: what the whole gradient is scaled by


def inner_gradient(k: Tensor, v: Tensor, weights, network: Network, out: Tensor | None = None) -> InnerGradient:
    """The gradient's factors at `weights` for keys and values [..., b, D], damped as `network` says. out: z_L where it is known."""
    split = network.split
    inputs, pre = [split.copy(k)], []
    for w in weights[:-1]:
        pre.append(inputs[-1] @ w)
        inputs.append(gelu(pre[-1]))
    if out is None:
        out = split.sum(inputs[-1] @ weights[-1])
    norm, damp = None, 1.0
    if network.residual_norm:
        n, mean, rstd = layer_norm(out)
        r = (k + n - v).mul(2)
        norm = (n, mean, rstd, r)
        error = layer_norm_vjp(r, out, mean, rstd)
        if network.eps:
            # Not from rstd, through which autograd sees nothing.
            variance = out.var(-1, correction=0, keepdim=True) + LN_EPS
            damp = variance / (variance + network.eps)
            error = error * damp
    else:
        error = (out - v).mul(2)
    deltas, back = [split.copy(error)], []
    for w, z in zip(reversed(weights[1:]), reversed(pre), strict=True):
        back.append(deltas[-1] @ w.mT)
        deltas.append(gelu_vjp(back[-1], z))
    return InnerGradient(inputs, deltas[::-1], pre, back[::-1], out, norm, damp)
