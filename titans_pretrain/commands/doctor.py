"""Is this machine ready? Versions, devices, optional packages, write access, and the memory scan against its oracle."""

import importlib.metadata
import os
import platform
import tempfile

import torch

from titans_pretrain.kernels.memory_scan import MemoryState, memory_scan

# What each package is for; none of them is needed to train on one process.
OPTIONAL = {
    "transformers": "export",
    "sentencepiece": "tokenizers",
    "tokenizers": "tokenizers",
    "webdataset": "reading shards elsewhere",
    "triton": "GPU kernels",
    "flash-attn": "GPU kernels",
    "deepspeed": "distributed training",
    "megatron-core": "distributed training",
    "tensorboard": "run.tensorboard",
    "wandb": "run.wandb",
}


def doctor() -> int:
    """Prints one line per check. Returns the exit code: 1 when one failed."""
    print(f"python        {platform.python_version()} on {platform.platform()}")
    print(f"titans        {_version('titans-pretrain')}")
    print(f"torch         {torch.__version__}, {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices       {os.cpu_count()} CPU cores; {', '.join(gpus) if gpus else 'no GPU'}")
    for name, purpose in OPTIONAL.items():
        print(f"{name:<14}{_version(name)} ({purpose})")
    checks = {"write access": _check_write(), "memory scan": _check_scan("cpu")}
    if gpus:
        checks["memory scan on cuda"] = _check_scan("cuda")
    for name, problem in checks.items():
        print(f"{name:<14}{'FAILED: ' + problem if problem else 'ok'}")
    return int(any(checks.values()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _check_write() -> str:
    try:
        with tempfile.TemporaryFile(dir="."):
            return ""
    except OSError as e:
        return f"{os.getcwd()} is not writable: {e.strerror}"


def _check_scan(device: str) -> str:
    """The default backend against the token loop, float64: outputs, final weights and the gradient of the keys."""
    results = {}
    for backend in ("reference", "auto"):
        random = torch.Generator().manual_seed(0)
        B, T, H, D, F = 2, 37, 2, 8, 16

        def draw(*shape, random=random):
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(device)

        q, k, v = (torch.nn.functional.normalize(draw(B, T, H, D), dim=-1) for _ in range(3))
        forget, momentum, lr = (scale * torch.sigmoid(draw(B, T, H, 1)) for scale in (0.1, 0.9, 0.1))
        initial = MemoryState.initial((draw(H, D, F) / D**0.5, draw(H, F, D) / F**0.5), batch=B)
        k.requires_grad_()
        y, state = memory_scan(
            q, k, v, forget, momentum, lr, initial,
            chunk_size=16, residual_norm=True, forget_to="initial", initial_state=initial, backend=backend,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(y.square().sum(), k)
        results[backend] = (y, *state.weights, gradient)
    with torch.no_grad():
        pairs = zip(results["auto"], results["reference"], strict=True)
        error = float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max())
    return "" if error < 1e-10 else f"differs from its reference by {error:.1e} (relative), more than 1e-10"
