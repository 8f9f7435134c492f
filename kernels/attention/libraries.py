"""Adapters of the libraries of flash kernels: their raw forward and backward passes over sequences of variable length.

All take bottom-right aligned masks, a window of (left, right) neighbours, -1 (FlashAttention 4: None) for no bound, and give the lse
as [H, N] float32. None of their backward passes takes part in autograd here, so that all are used alike.
"""

import importlib
import inspect
import sys
from functools import cache

import torch
from torch import Tensor

from titans_pretrain.kernels.attention.merged import Library, Span

_HALF = (torch.float16, torch.bfloat16)


def _aten_forward(q: Tensor, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, span.queries, span.keys, span.longest_queries, span.longest_keys, 0.0, _causal(span), False,
        scale=_scale(q), window_size_left=span.left, window_size_right=span.right,
    )  # fmt: skip
    return out, lse


def _aten_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, span: Span):
    random, unused = q.new_zeros(2, dtype=torch.uint64), q.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, span.queries, span.keys, span.longest_queries, span.longest_keys, 0.0, _causal(span),
        random, unused, scale=_scale(q), window_size_left=span.left, window_size_right=span.right,
    )  # fmt: skip


def _refuses_aten(q: Tensor) -> str | None:
    reason = _refuses_tensor(q, (8, 9, 10, 11, 12))
    if reason is None and not _torch_has_flash():
        return "q: this build of torch has no flash attention for CUDA"
    return reason


_FLASH_2 = "flash_attn.flash_attn_interface"


def _flash_2_forward(q: Tensor, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    out, lse, *_ = sys.modules[_FLASH_2]._flash_attn_varlen_forward(
        q, k, v, span.queries, span.keys, span.longest_queries, span.longest_keys, dropout_p=0.0, softmax_scale=_scale(q),
        causal=_causal(span), window_size_left=span.left, window_size_right=span.right,
    )  # fmt: skip
    return out, lse


def _flash_2_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, span: Span):
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    sys.modules[_FLASH_2]._flash_attn_varlen_backward(
        grad, q, k, v, out, lse, dq, dk, dv, span.queries, span.keys, span.longest_queries, span.longest_keys,
        dropout_p=0.0, softmax_scale=_scale(q), causal=_causal(span), window_size_left=span.left, window_size_right=span.right,
        softcap=0.0, alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


def _refuses_flash_2(q: Tensor) -> str | None:
    functions = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
    return _refuses_tensor(q, (8, 9, 10, 11, 12)) or _refuses_module(
        _FLASH_2, "flash-attn 2.8", functions, "window_size_left"
    )


_FLASH_3 = "flash_attn_interface"


def _flash_3_forward(q: Tensor, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    out, lse, *_ = sys.modules[_FLASH_3]._flash_attn_forward(
        q, k, v, cu_seqlens_q=span.queries, cu_seqlens_k=span.keys, max_seqlen_q=span.longest_queries,
        max_seqlen_k=span.longest_keys, softmax_scale=_scale(q), causal=_causal(span), window_size_left=span.left,
        window_size_right=span.right,
    )  # fmt: skip
    return out, lse


def _flash_3_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, span: Span):
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    sys.modules[_FLASH_3]._flash_attn_backward(
        grad, q, k, v, out, lse, cu_seqlens_q=span.queries, cu_seqlens_k=span.keys, max_seqlen_q=span.longest_queries,
        max_seqlen_k=span.longest_keys, dq=dq, dk=dk, dv=dv, softmax_scale=_scale(q), is_causal=_causal(span),
        window_size_left=span.left, window_size_right=span.right,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


def _refuses_flash_3(q: Tensor) -> str | None:
    functions = ("_flash_attn_forward", "_flash_attn_backward")
    return _refuses_tensor(q, (9,)) or _refuses_module(
        _FLASH_3, "FlashAttention 3 of late 2025", functions, "window_size_left"
    )


_FLASH_4 = "flash_attn.cute.interface"


def _flash_4_options(q: Tensor, span: Span) -> dict:
    return dict(
        softmax_scale=_scale(q), causal=_causal(span), window_size_left=None if span.left < 0 else span.left,
        window_size_right=None if span.right < 0 else span.right, cu_seqlens_q=span.queries, cu_seqlens_k=span.keys,
        max_seqlen_q=span.longest_queries, max_seqlen_k=span.longest_keys,
    )  # fmt: skip


def _flash_4_forward(q: Tensor, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    out, lse, *_ = sys.modules[_FLASH_4]._flash_attn_fwd(q, k, v, return_lse=True, **_flash_4_options(q, span))
    return out, lse


def _flash_4_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, span: Span):
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    sys.modules[_FLASH_4]._flash_attn_bwd(
        q, k, v, out, grad, lse, dq=dq, dk=dk, dv=dv, deterministic=torch.are_deterministic_algorithms_enabled(),
        **_flash_4_options(q, span),
    )  # fmt: skip
    return dq, dk, dv


def _refuses_flash_4(q: Tensor) -> str | None:
    functions = ("_flash_attn_fwd", "_flash_attn_bwd")
    reason = _refuses_tensor(q, (9, 10)) or _refuses_module(
        _FLASH_4, "flash-attn-4 4.0.0b36", functions, "max_seqlen_q"
    )
    if reason is None and q.shape[-1] > 128 and _generation(q.device) == 10:
        return f"q: heads of {q.shape[-1]}, and on this GPU it has kernels for 128 at most"
    return reason


# In the order in which "auto" tries them: the fastest that is released first. FlashAttention 4 is a beta.
LIBRARIES = (
    Library("flash_attn_3", _flash_3_forward, _flash_3_backward, _refuses_flash_3),
    Library("flash_attn_2", _flash_2_forward, _flash_2_backward, _refuses_flash_2),
    Library("aten", _aten_forward, _aten_backward, _refuses_aten),
    Library("flash_attn_4", _flash_4_forward, _flash_4_backward, _refuses_flash_4),
)


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def _causal(span: Span) -> bool:
    """With a window the libraries have it all in (left, right)."""
    return span.causal and span.left < 0


def _refuses_tensor(q: Tensor, generations: tuple[int, ...]) -> str | None:
    """generations: major numbers of the compute capabilities that it runs on."""
    if q.device.type != "cuda":
        return f"q: it is on {q.device.type}, and its kernels are for cuda"
    if q.dtype not in _HALF:
        return f"q: {str(q.dtype).removeprefix('torch.')}, and it has float16 and bfloat16 only"
    size = q.shape[-1]
    if size % 8 or size > 256:
        return f"q: heads of {size}, and it has multiples of 8 up to 256 only"
    major = _generation(q.device)
    if major not in generations:
        legal = ", ".join(f"{g}.x" for g in generations)
        return f"q: a GPU of compute capability {major}.x, and its kernels are for {legal}"
    return None


# What a machine has does not change: torch.compile need not trace how it is found out.


@torch.compiler.assume_constant_result
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


@torch.compiler.assume_constant_result
def _torch_has_flash() -> bool:
    return not torch.version.hip and torch.backends.cuda.is_flash_attention_available()


@torch.compiler.assume_constant_result
def _refuses_module(name: str, wanted: str, functions: tuple[str, ...], parameter: str) -> str | None:
    """parameter: of these functions of the module, which older versions lack."""
    problem = _import(name)
    if problem is not None:
        return f"q: it needs {wanted} or newer ({problem})"
    module = sys.modules[name]
    if all(_takes(getattr(module, function, None), parameter) for function in functions):
        return None
    return f"q: it needs {wanted} or newer; the {name} that is installed has other functions"


@cache
def _import(name: str) -> str | None:
    """Why the module cannot be imported, if it cannot."""
    try:
        importlib.import_module(name)
    except Exception as e:  # a build for another torch fails with any error
        return f"{type(e).__name__}: {' '.join(str(e).split())}"
    return None


@cache
def _takes(function, parameter: str) -> bool:
    """Whether a function, or a custom operator of torch, has this parameter."""
    operator = getattr(function, "_opoverload", None)
    if operator is not None:
        return any(a.name == parameter for a in operator._schema.arguments)
    return callable(function) and parameter in inspect.signature(function).parameters
