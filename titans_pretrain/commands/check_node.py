"""Before a job computes: is this node fit for it? Without torch, so that the answer comes at once."""

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import socket
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from titans_pretrain.commands.jobs import jobs_folder
from titans_pretrain.commands.programs import output_of
from titans_pretrain.config import Config

MIB, GIB = 2**20, 2**30
# Variables that decide what a job does. Whatever looks like a secret stays out.
_KEPT = re.compile(
    "(SLURM|SBATCH|CUDA|NVIDIA|NCCL|GLOO|OMP|GOMP|MKL|MASTER|TORCH|PYTORCH|TRITON|TITANS|DS|HF)_|(PYTHON|LD_LIBRARY_)?PATH$|VIRTUAL_ENV$"
)
_SECRET = re.compile("KEY|TOKEN|SECRET|PASS|JWT|CRED", re.IGNORECASE)


def check_node(folder: Path, config: Config | None = None) -> None:
    """Makes `folder`, where the job will write, and checks this node: room on disk, and the GPUs that the job asked for unless the
    config trains on a CPU. For a run (config) in a job, writes down the node's environment. Raises ValueError naming the node and
    everything that it lacks."""
    lacks = [_folder_lacks(folder), _disk_lacks(Path(tempfile.gettempdir()), 100 * MIB)]
    if config is None or config.train.device != "cpu":
        lacks.append(_gpus_lack(int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))))
    if told := list(filter(None, lacks)):
        raise ValueError(f"node {_node()}: {'; '.join(told)}")
    if config is not None and (job := os.environ.get("SLURM_JOB_ID")):
        records = jobs_folder(folder) / job
        records.mkdir(parents=True, exist_ok=True)
        name = f"environment-{_node()}-{os.environ.get('SLURM_RESTART_COUNT', '0')}.txt"
        (records / name).write_text(environment())


def environment() -> str:
    """What a job on this node computes with: versions, GPUs, and the variables that matter."""
    kept = sorted(name for name in os.environ if _KEPT.match(name) and not _SECRET.search(name))
    packages = sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions() if d.name})
    gpus = output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total,uuid", "--format=csv,noheader")
    lines = [
        f"node {_node()} ({socket.gethostname()}), {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        f"{shlex.join(sys.argv)} in {os.getcwd()}",
        f"Python {platform.python_version()} {sys.executable}, {platform.platform()}",
        f"sources {_sources()}",
    ]
    lines += ["", "GPUs", *(gpus or "none").splitlines()]
    lines += ["", "variables", *(f"{name}={os.environ[name]}" for name in kept)]
    lines += ["", "packages", *packages]
    return "\n".join(lines) + "\n"


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _sources() -> str:
    """Where the package is, and its commit if that is a git checkout."""
    root = str(Path(__file__).parents[2])
    commit = output_of("git", "-C", root, "rev-parse", "HEAD")
    if not commit:
        return root
    changed = output_of("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return f"{root}, commit {commit.strip()}{' with changes' if changed else ''}"


def _folder_lacks(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as e:
        return f"cannot write in {folder}: {e.strerror or e}"
    # The next checkpoint of a run that goes on is about as large as the last one.
    newest = max(folder.glob("checkpoints/step-*"), default=None)
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) if newest else 0
    return _disk_lacks(folder, max(GIB, round(1.1 * size)))


def _disk_lacks(folder: Path, needed: int) -> str | None:
    free = shutil.disk_usage(folder).free
    return f"{free / GIB:.1f} GiB are free in {folder}, {needed / GIB:.1f} are needed" if free < needed else None


def _gpus_lack(asked: int) -> str | None:
    if not asked:
        return None
    if (listed := output_of("nvidia-smi", "--list-gpus")) is None:
        return f"the job asked for {asked} GPUs a node, and nvidia-smi does not answer"
    seen = sum(
        line.startswith("GPU ") for line in listed.splitlines()
    )  # more than asked where a job sees those of others
    return f"the job asked for {asked} GPUs a node, and nvidia-smi sees {seen}" if seen < asked else None
