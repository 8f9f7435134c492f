"""How far a run is through its data, and how well it uses its devices."""

import re
import time
from functools import cache

import torch

from titans_pretrain.config import Config
from titans_pretrain.models.costs import head_cost, layer_flops

# Peak FLOP/s of dense matrix products by the name that torch gives a GPU: (bf16, fp32), from the vendor's data sheets.
GPU_PEAKS = {
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "B200": (2250e12, 75e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
}
_SIZE = 512  # of the matrices by which a CPU is measured


class Gauge:
    """corpus_tokens: of all training data; processes: of the run, each with a device like this one."""

    def __init__(self, config: Config, device: torch.device, processes: int, corpus_tokens: int):
        self.corpus_tokens = corpus_tokens
        self.peak = peak_flops(device, config.train.precision)
        self.step_flops = model_flops(config) * config.train.global_batch * config.data.seq_len
        self._all = self.peak and self.peak * processes

    def read(self, seconds: float, tokens: int) -> dict[str, float]:
        """Of a step that took so long, after so many tokens: `epochs`, and `mfu` (model FLOPs utilisation, a share of 1) where the
        device's peak is known."""
        found = {"epochs": round(tokens / self.corpus_tokens, 4)} if self.corpus_tokens else {}
        return found | ({"mfu": round(self.step_flops / seconds / self._all, 4)} if self._all else {})


def model_flops(config: Config) -> float:
    """Matrix-product FLOPs of one token in training, the memory's inner loop counted, recomputation of blocks or segments not."""
    layers = config.model.layer_configs
    return head_cost(config.model) + sum(layer_flops(c, config.data.seq_len).training() for c in layers)


@cache
def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of this process's device: measured on a CPU, with the threads that torch has; known of some GPUs, else None."""
    if device.type == "cpu":
        return _measure(torch.bfloat16 if precision == "bf16" else torch.float32)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return known_peak(name, precision)


def known_peak(name: str, precision: str) -> float | None:
    """Of the GPU with this name; None if it is not in GPU_PEAKS."""
    for part, peaks in GPU_PEAKS.items():
        if all(re.search(rf"\b{word}\b", name) for word in part.split()):
            return peaks[precision == "fp32"]
    return None


def _measure(dtype: torch.dtype) -> float:
    x = torch.ones(_SIZE, _SIZE, dtype=dtype)  # no random numbers: those are the run's
    times = []
    for _ in range(6):
        start = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - start)
    return 2 * _SIZE**3 / min(times[1:])
