"""Triton's interpreter, made right for bfloat16.

As released it multiplies the bit patterns of bfloat16 operands in tl.dot, and cuts float32 off instead of rounding it. Other
arithmetic in bfloat16 stays wrong: the kernels do all but products in float32.

And made quick: a function that a kernel calls finds the language's functions replaced already. Replacing them once more, as released,
is most of the time.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


def widened(x: np.ndarray) -> np.ndarray:
    """bfloat16, as the interpreter holds it, to float32."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)


def repair() -> None:
    """Once a process."""
    builder = InterpreterBuilder
    if hasattr(builder, "released_dot"):
        return
    builder.released_dot = builder.create_dot
    released = {name: getattr(builder, name) for name in ("cast_impl", "create_fp_to_fp")}

    def operand(x: TensorHandle) -> TensorHandle:
        return TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self, a, b, *rest):
        return self.released_dot(operand(a), operand(b), *rest)

    def cast(name):
        def convert(self, x, dtype, *rest):
            types = (x.dtype.scalar, dtype.scalar)
            if types == (tl.bfloat16, tl.float32):
                return operand(x)
            if types == (tl.float32, tl.bfloat16):
                return TensorHandle(rounded(x.data), tl.bfloat16)
            return released[name](self, x, dtype, *rest)

        return convert

    builder.create_dot = create_dot
    for name in released:
        setattr(builder, name, cast(name))

    released_call, ready = InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        if self.fn.__globals__.get("tl") is not tl and self.fn not in ready:  # a function of triton's own
            ready.add(self.fn)
            return released_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call
