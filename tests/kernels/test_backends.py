"""One rule chooses the backend of every kernel."""

import inspect
import logging
import re
from pathlib import Path

import pytest
import torch

from titans_pretrain.kernels import attention, cross_entropy, memory_scan, short_conv
from titans_pretrain.kernels.backends import Backend, choose

KERNELS = (attention, cross_entropy, memory_scan, short_conv)


def on_cuda_only(*, q, **_):
    return None if q.device.type == "cuda" else f"q: it is on {q.device.type}, and the kernels are for cuda"


def no_split(*, split, **_):
    return "split: it holds everything on one rank" if split else None


CHOICES = (
    Backend("fast", print, on_cuda_only),
    Backend("plain", print),
    Backend("slow", print, no_split),
)


def test_auto_takes_the_first_that_can_serve_and_says_so_once(caplog):
    arguments = {"q": torch.zeros(2), "split": None}
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert choose("some_kernel", CHOICES, "auto", arguments).name == "plain"
    (record,) = caplog.records
    assert record.getMessage() == (
        "some_kernel: backend plain (backend=fast cannot serve q: it is on cpu, and the kernels are for cuda)"
    )
    assert choose("some_kernel", CHOICES, "auto", {"q": torch.zeros(2, device="meta"), "split": None}).name == "plain"


def test_a_named_backend_is_taken_or_refuses_with_the_argument():
    arguments = {"q": torch.zeros(2), "split": 2}
    assert choose("some_kernel", CHOICES, "plain", arguments).name == "plain"
    for name, message in (
        ("fast", "some_kernel: backend=fast cannot serve q: it is on cpu, and the kernels are for cuda"),
        ("slow", "some_kernel: backend=slow cannot serve split: it holds everything on one rank"),
        ("other", "some_kernel: backend='other' is not one of auto, fast, plain, slow"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            choose("some_kernel", CHOICES, name, arguments)


def test_auto_goes_on_where_a_backend_leaves_a_call():
    backends = (Backend("fast", print, leaves=lambda **_: "q: it is small"), *CHOICES[1:])
    arguments = {"q": torch.zeros(2), "split": None}
    assert choose("some_kernel", backends, "auto", arguments).name == "plain"
    assert choose("some_kernel", backends, "fast", arguments).name == "fast"


def test_nothing_serves():
    with pytest.raises(ValueError, match=r"^k: backend=fast cannot serve q: .*; backend=slow cannot serve split: .*$"):
        choose("k", CHOICES[::2], "auto", {"q": torch.zeros(2), "split": 2})


@pytest.mark.parametrize("package", KERNELS, ids=lambda package: package.__name__.rpartition(".")[2])
def test_siblings_look_alike(package):
    """README.md, contract.py, reference.py, and `backend="auto"` in every public function that has one."""
    folder = Path(package.__file__).parent
    for name in ("README.md", "contract.py", "reference.py"):
        assert (folder / name).is_file(), f"{folder.name} has no {name}"
    assert "distributed" not in "".join(path.read_text() for path in folder.rglob("*.py"))
    functions = [
        f for name in package.__all__ if inspect.isfunction(f := getattr(package, name)) and name != "telescope"
    ]
    assert functions
    for function in functions:
        assert function.__module__ == f"{package.__name__}.contract"
        assert inspect.signature(function).parameters["backend"].default == "auto"
