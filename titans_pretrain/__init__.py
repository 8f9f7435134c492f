"""Distributed pretraining of Titans. What is most used is here; it is imported when it is asked for, as torch takes a while."""

from importlib import import_module
from pathlib import Path

# Installed, kernels/ and data_prep/ stand in this folder. In the repository they stand beside it, and kernels/ has no __init__.py:
# as a regular package it would hide the Hugging Face package `kernels` from whoever runs Python at the repository's root.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

_HOME = {
    "load_config": "config",
    "build_model": "models",
    "MemoryLayer": "models.memory",
    "memory_scan": "kernels.memory_scan",
}
__all__ = ["MemoryLayer", "__version__", "build_model", "load_config", "memory_scan"]


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("titans-pretrain")
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
