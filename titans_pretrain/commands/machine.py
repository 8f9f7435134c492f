"""What a machine is made of, and the faults that are known of what is installed on it. Needs torch alone."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from titans_pretrain.commands.programs import output_of

# What each package is for; none of them is needed to train on one process.
OPTIONAL = {
    "transformers": "export",
    "sentencepiece": "tokenizers",
    "tokenizers": "tokenizers",
    "webdataset": "reading shards elsewhere",
    "triton": "GPU kernels",
    "flash-attn": "GPU kernels",
    "flash-attn-3": "GPU kernels",
    "flash-attn-4": "GPU kernels",
    "flash-linear-attention": "peers in benchmarks",
    "titans-pytorch": "peers in benchmarks",
    "deepspeed": "distributed training",
    "megatron-core": "distributed training",
    "tensorboard": "run.tensorboard",
    "wandb": "run.wandb",
}
PTXAS = "TRITON_PTXAS_PATH"


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory_gib: float


@dataclass(frozen=True)
class Ptxas:
    """The assembler that triton's kernels go through."""

    path: str
    version: str | None  # None: it cannot be run


@dataclass(frozen=True)
class Machine:
    python: str
    system: str
    cores: int
    threads: int  # of torch
    torch: str
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None  # that torch was built for
    nccl: str | None = None
    packages: dict[str, str | None] = field(default_factory=dict)
    ptxas: Ptxas | None = None
    ptxas_variable: str | None = None  # TRITON_PTXAS_PATH
    newer_ptxas: str | None = None  # of a pip package that is installed
    slurm: str | None = None
    memory_free_gib: float | None = None
    disk_free_gib: float | None = None  # here


def this_machine() -> Machine:
    cuda = torch.cuda.is_available()
    return Machine(
        python=platform.python_version(),
        system=platform.platform(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        gpus=tuple(map(_gpu, range(torch.cuda.device_count()))) if cuda else (),
        driver=_driver(),
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.distributed.is_nccl_available() else None,
        packages={name: version_of(name) for name in OPTIONAL},
        ptxas=_ptxas(),
        ptxas_variable=os.environ.get(PTXAS),
        newer_ptxas=_newer_ptxas(),
        slurm=_slurm(),
        memory_free_gib=_memory_free(),
        disk_free_gib=round(shutil.disk_usage(".").free / 2**30, 1),
    )


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(i: int) -> Gpu:
    p = torch.cuda.get_device_properties(i)
    return Gpu(p.name, (p.major, p.minor), round(p.total_memory / 2**30, 1))


def _driver() -> str | None:
    found = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.split()[0] if found and found.strip() else None


def _ptxas() -> Ptxas | None:
    """The one that triton takes on a Hopper or older. Not asked of triton: an empty TRITON_PTXAS_PATH makes that fail."""
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return None
    own = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/ptxas"
    path = os.environ.get(PTXAS) or (str(own) if own.exists() else shutil.which("ptxas"))
    return None if path is None else Ptxas(path, ptxas_version(path))


def ptxas_version(path: str) -> str | None:
    """ "12.8.93" """
    found = re.search(r"\bV(\d+(?:\.\d+)+)", output_of(path, "--version") or "")
    return found[1] if found else None


def _newer_ptxas() -> str | None:
    """The file of the pip package nvidia-cuda-nvcc, if it is there."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("cu*/bin/ptxas"), reverse=True):
            return str(path)
    return None


def _slurm() -> str | None:
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"in job {job}"
    return "installed" if shutil.which("srun") else None


def _memory_free() -> float | None:
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:  # not on Linux
        return None
    return round(int(found[1]) / 2**20, 1) if found else None


# Known faults: what is wrong, and what to do, or None.


def empty_ptxas_path(m: Machine) -> str | None:
    if m.ptxas_variable == "" and m.packages.get("triton"):
        return f"{PTXAS} is set and empty, and triton fails at its first kernel: unset {PTXAS}"
    return None


def unusable_ptxas(m: Machine) -> str | None:
    if m.ptxas is not None and m.ptxas.version is None and m.gpus:
        return (
            f"{m.ptxas.path} cannot be run, and triton has no other: install triton anew, or point {PTXAS} at a ptxas"
        )
    return None


def transposed_operand(m: Machine) -> str | None:
    """fla issue 640: a product that is transposed and is the left operand of another one, on Hopper."""
    found = m.packages.get("triton")
    if found and (3, 4, 0) <= _numbers(found) < (3, 7, 1) and (gpu := _of_generation(m, 9)):
        return (
            f"triton {found} on {gpu.name} computes some products of products wrongly. The kernels here avoid them, those of other "
            "packages may not: use torch 2.12.1 or newer, which brings triton 3.7.1 or newer"
        )
    return None


def wgmma_registers(m: Machine) -> str | None:
    """triton pull request 11781: an asynchronous product whose left operand is in registers that are used again too early."""
    if m.ptxas and m.ptxas.version and _numbers(m.ptxas.version) < (13, 1) and (gpu := _of_generation(m, 9)):
        other = m.newer_ptxas or "$(python -c 'import nvidia; print(nvidia.__path__[0])')/cu13/bin/ptxas"
        install = "" if m.newer_ptxas else "pip install 'nvidia-cuda-nvcc>=13.3', then "
        return (
            f"ptxas {m.ptxas.version} ({m.ptxas.path}) can make wrong code for the tensor cores of {gpu.name}; 13.3 and newer does "
            f"not: {install}export {PTXAS}={other}"
        )
    return None


def unproven_generation(m: Machine) -> str | None:
    if gpu := next((g for g in m.gpus if g.capability[0] >= 10), None):
        return (
            f"{gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]}) is newer than what the GPU kernels here were proven on: "
            "run `python -m benchmarks.gpu --only proof` first, or set model.memory.backend=chunked"
        )
    return None


FAULTS: tuple[Callable[[Machine], str | None], ...] = (
    empty_ptxas_path, unusable_ptxas, transposed_operand, wgmma_registers, unproven_generation,
)  # fmt: skip


def faults(m: Machine) -> dict[str, str]:
    """Those that apply, by name."""
    return {f.__name__: told for f in FAULTS if (told := f(m))}


def _of_generation(m: Machine, major: int) -> Gpu | None:
    return next((g for g in m.gpus if g.capability[0] == major), None)


def _numbers(version: str) -> tuple[int, ...]:
    """(3, 7, 1) of "3.7.1+git123", always three."""
    found = [int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3]]
    return tuple(found + [0] * (3 - len(found)))
