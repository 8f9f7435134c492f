"""Triton kernels compiled for a GPU that need not be there, and what their machine code uses.

In a process without TRITON_INTERPRET. What would be launched is recorded from the launching code itself, on tensors without data.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.bool: "*i1", torch.uint8: "*u8"
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel with the types of its arguments and the values of its constants, as triton compiles it."""

    kernel: triton.JITFunction
    types: tuple  # by argument: "*bf16", "i32", "fp32", tuples of these, or "constexpr"
    constants: tuple
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.removesuffix("_kernel")

    @property
    def hidden(self) -> int:
        """Rows of the last matrix that a program works on; 0: none."""
        return self.constant("BH")

    def constant(self, name: str) -> int:
        """0: it has none of that name."""
        names = [p.name for p in self.kernel.params if p.is_constexpr]
        return dict(zip(names, self.constants, strict=True)).get(name, 0)


@dataclass(frozen=True)
class Resources:
    """Of one thread (registers, bytes spilled) and one program (bytes of shared memory); counts of instructions.

    miscompiled: operands of the form that triton before 3.7.1 gets wrong on Hopper: a product's result, transposed, on the left of
    a product
    """

    registers: int
    spilled: int
    shared: int
    wgmma: int
    mma: int
    miscompiled: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Nothing is launched here: what would have been, each kind once, is in the list."""
    found: list[Launch] = []

    def record(kernel, *arguments, grid, warmup, num_warps=4, num_stages=3, **named):
        bound = kernel.signature.bind(*arguments, **named).arguments
        constants = tuple(bound[p.name] for p in kernel.params if p.is_constexpr)
        types = tuple("constexpr" if p.is_constexpr else _type(bound[p.name]) for p in kernel.params)
        launch = Launch(kernel, types, constants, num_warps, num_stages)
        if launch not in found:
            found.append(launch)

    released, triton.JITFunction.run = triton.JITFunction.run, record
    try:
        yield found
    finally:
        triton.JITFunction.run = released


def _type(x):
    if isinstance(x, tuple):
        return tuple(_type(y) for y in x)
    if isinstance(x, Tensor):
        return TYPES[x.dtype]
    return "fp32" if isinstance(x, float) else "i32"


def compile_launch(launch: Launch, arch: int) -> Resources:
    """arch: 90 for sm_90."""
    names = launch.kernel.arg_names
    constant_at = [(i,) for i, kind in enumerate(launch.types) if kind == "constexpr"]
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(zip(names, launch.types, strict=True)),
        constexprs=dict(zip(constant_at, launch.constants, strict=True)),
        attrs={place: [["tt.divisibility", 16]] for place in _pointers(launch.types)},
    )
    options = dict(num_warps=launch.warps, num_stages=launch.stages)
    return _resources(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options))


def _pointers(types: tuple, place: tuple = ()) -> Iterator[tuple]:
    """Where there are tensors: their memory is aligned."""
    for i, kind in enumerate(types):
        if isinstance(kind, tuple):
            yield from _pointers(kind, (*place, i))
        elif kind.startswith("*"):
            yield (*place, i)


def _resources(compiled) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Resources(
        registers=registers,
        spilled=stack + local,
        shared=compiled.metadata.shared,
        wgmma=len(re.findall(r"\bHGMMA", code)),
        mma=len(re.findall(r"\bHMMA", code)),
        miscompiled=miscompiled(compiled.asm["ttgir"]),
    )


def miscompiled(ttgir: str) -> int:
    """Of 16-bit elements: what goes wrong is how stmatrix stores them, which no program on float32 operands has."""
    stored = re.findall(r"local_alloc [^\n]*xb?f16, #linear", ttgir)
    transposed = re.findall(r"tt\.trans [^\n]*xb?f16, #mma\d*> ?->", ttgir)
    return len(stored) + len(transposed)


def ptxas_version(arch: int) -> str:
    """Of the one that triton takes."""
    return re.search(r"release ([\d.]+)", get_ptxas_version(arch))[1]


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
