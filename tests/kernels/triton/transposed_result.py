"""A script: how often the compile guard finds its pattern in a kernel that has it, and in one that has not."""

import triton
import triton.language as tl

from benchmarks.compiled import Launch, compile_launch


@triton.jit
def products(q, k, out, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    scores = tl.dot(tl.load(q + at), tl.trans(tl.load(k + at))).to(tl.bfloat16)
    left = tl.trans(scores) if TRANSPOSED else scores
    tl.store(out + at, tl.dot(left, tl.load(q + at)))


for transposed in (True, False):
    types = ("*bf16", "*bf16", "*fp32", "constexpr", "constexpr")
    print(compile_launch(Launch(products, types, (64, transposed), 4, 1), 90).miscompiled)
