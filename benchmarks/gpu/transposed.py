"""A product that is rounded, transposed and multiplied again: triton from 3.4.0 to 3.7.0 computes it wrongly on Hopper (fla issue 640).

Our kernels have no such product; this says whether the compiler that is here has the fault. Needs triton."""

import torch
import triton
import triton.language as tl

from benchmarks.gpu.harness import relative_error

SIZE = 64


@triton.jit
def _kernel(a, b, c, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inner = tl.dot(tl.load(a + at), tl.trans(tl.load(b + at))).to(out.dtype.element_ty)
    tl.store(out + at, tl.dot(tl.trans(inner), tl.load(c + at)).to(out.dtype.element_ty))


def transposed_operand(device: torch.device) -> float:
    """Relative error of (A B')' C, its inner product rounded, against torch on the same rounded numbers."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter has no bfloat16
    random = torch.Generator(device).manual_seed(0)
    a, b, c = (torch.randn(SIZE, SIZE, generator=random, device=device).to(dtype) for _ in range(3))
    out = torch.empty_like(a)
    _kernel[(1,)](a, b, c, out, SIZE=SIZE, num_warps=4)
    inner = (a.double() @ b.double().mT).to(dtype).double()
    return relative_error(out, inner.mT @ c.double())
