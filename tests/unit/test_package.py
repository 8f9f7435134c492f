"""What the package itself offers, and how fast."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import titans_pretrain

HEAVY = ("torch", "transformers", "pydantic", "omegaconf", "numpy")


def heavy_imports(code: str) -> str:
    code += f"; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[
        -1
    ]


def test_its_names_are_what_they_say():
    from titans_pretrain import MemoryLayer, build_model, load_config, memory_scan
    from titans_pretrain.config.load import load_config as home_of_load_config
    from titans_pretrain.kernels.memory_scan.contract import memory_scan as home_of_memory_scan
    from titans_pretrain.models.causal_lm import build_model as home_of_build_model
    from titans_pretrain.models.memory import MemoryLayer as HomeOfMemoryLayer

    assert (load_config, memory_scan) == (home_of_load_config, home_of_memory_scan)
    assert (build_model, MemoryLayer) == (home_of_build_model, HomeOfMemoryLayer)
    assert titans_pretrain.__version__ == version("titans-pretrain")
    assert set(titans_pretrain.__all__) <= set(dir(titans_pretrain))
    with pytest.raises(AttributeError, match="module 'titans_pretrain' has no attribute 'build_modle'"):
        _ = titans_pretrain.build_modle


def test_nothing_heavy_is_imported_before_it_is_asked_for():
    assert heavy_imports("import titans_pretrain as t; t.__version__; from titans_pretrain import load_config") == "[]"
    cli = "from titans_pretrain import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\npass"
    assert heavy_imports(cli) == "[]"


@pytest.mark.parametrize(
    ("module", "name"), [("titans_pretrain", "titans-pretrain"), ("titans_pretrain.data_prep", "titans-data")]
)
def test_commands_tell_their_version(module, name):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{name} {titans_pretrain.__version__}\n"
