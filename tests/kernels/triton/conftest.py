"""The kernels of the memory scan: on CUDA where there is a GPU, else interpreted (tests/conftest.py)."""

import os
from importlib.util import find_spec

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import repair

    repair()
