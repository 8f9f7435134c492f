"""Where the kernels' tests run: every backend of a kernel on every device of this machine."""

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def targets(backends, *, oracle=True):
    """Values for parametrize("device, backend"): `backends` as in a kernel's contract.py. oracle: the reference as well. Triton's
    kernels have tests of their own, with shapes that they serve (triton/)."""
    names = [b.name for b in backends if b.name != "triton" and (oracle or b.name != "reference")]
    return [
        pytest.param(device, name, marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device in DEVICES
        for name in names
    ]
