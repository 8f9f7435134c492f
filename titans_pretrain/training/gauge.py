"""How far a run is through its data, and how well it uses its devices."""

import re
import time
from collections.abc import Sequence
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
        self._config = config
        self._flops = {length: model_flops(config, length) for length in config.data.lengths}  # of a token
        self._all = self.peak and self.peak * processes

    def read(self, seconds: float, steps: Sequence[int], tokens: int) -> dict[str, float]:
        """Of steps, by their numbers, that took so long together: `epochs` after so many tokens, and `mfu` (model FLOPs utilisation,
        a share of 1) where the device's peak is known."""
        found = {"epochs": round(tokens / self.corpus_tokens, 4)} if self.corpus_tokens else {}
        flops = sum(map(self.step_flops, steps))
        return found | ({"mfu": round(flops / seconds / self._all, 4)} if self._all else {})

    def step_flops(self, step: int) -> float:
        """Of step 1, 2, ..., as the warm-ups have it."""
        train, data = self._config.train, self._config.data
        return self._flops[data.length_at(step - 1)] * train.batch_at(step - 1) * data.seq_len


def model_flops(config: Config, length: int | None = None) -> float:
    """Matrix-product FLOPs of one token in training, the memory's inner loop counted, recomputation of blocks or segments not.
    length: tokens in a row; None: data.seq_len."""
    layers, length = config.model.layer_configs, length or config.data.seq_len
    return head_cost(config.model) + sum(layer_flops(c, length).training() for c in layers)


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
