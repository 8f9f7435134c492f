"""Triton kernels compiled for a GPU that need not be there, and what the machine code uses. In a process without TRITON_INTERPRET."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


def compile_kernel(kernel, arguments: dict, warps: int, stages: int, arch: int) -> Resources:
    """arguments: by parameter, a type as triton writes it ("*bf16", "i32", "fp32") or the value of a constexpr."""
    names = kernel.arg_names
    assert set(names) == set(arguments), set(names) ^ set(arguments)
    constants = {p.name for p in kernel.params if p.is_constexpr}
    aligned = {n for n in names if n not in constants and arguments[n].startswith("*")}
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else arguments[n] for n in names},
        constexprs={(i,): arguments[n] for i, n in enumerate(names) if n in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned},
    )
    options = dict(num_warps=warps, num_stages=stages)
    return _resources(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options))


def _resources(compiled) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    ir = compiled.asm["ttgir"]
    return Resources(
        registers=registers,
        spilled=stack + local,
        shared=compiled.metadata.shared,
        wgmma=len(re.findall(r"\bHGMMA", code)),
        mma=len(re.findall(r"\bHMMA", code)),
        miscompiled=len(re.findall(r"local_alloc [^\n]*#linear", ir))
        + len(re.findall(r"tt\.trans [^\n]*#mma\d*> ?->", ir)),
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
