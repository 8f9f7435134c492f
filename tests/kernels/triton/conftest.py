"""The kernels of the memory scan: on CUDA where there is a GPU, else interpreted (tests/conftest.py)."""

import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import repair

    repair()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        for item in items:
            if os.path.dirname(__file__) in str(item.path):
                item.add_marker(pytest.mark.gpu)
