"""The import mapping: folders kernels/ and data_prep/ are titans_pretrain.kernels and titans_pretrain.data_prep, installed or
not, and the Hugging Face package `kernels` stays importable beside them."""

import importlib.machinery
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "titans_pretrain": "titans_pretrain",
    "kernels": "titans_pretrain.kernels",
    "data_prep": "titans_pretrain.data_prep",
    "configs": "titans_pretrain.configs",
    "slurm": "titans_pretrain.slurm",
}
OTHER = {"configs": (".yaml",), "slurm": (".sh", ".sbatch")}  # what is taken of folders without Python files

BOTH = """
import os, kernels, titans_pretrain.data_prep.cli
from titans_pretrain.kernels.memory_scan import memory_scan
assert callable(kernels.get_kernel), kernels
print(os.path.dirname(titans_pretrain.__file__))
"""


def installed_names() -> dict[str, Path]:
    """{path inside the wheel: source} of every Python file, config and Slurm template."""
    return {
        package.replace(".", "/") + "/" + path.relative_to(ROOT / folder).as_posix(): path
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in OTHER.get(folder, (".py",))
    }


def run(*command, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves its build folder in the sources and takes what it finds there."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, copy, cwd=out)
    return next(out.glob("*.whl"))


def test_every_folder_with_python_files_is_a_listed_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {os.path.dirname(name).replace("/", ".") for name in installed_names() if name.endswith(".py")}
    assert found <= set(listed), "add these to `packages` in pyproject.toml"
    assert set(listed) <= found | set(FOLDERS.values()), "these listed packages hold no Python file"


def test_the_wheel_holds_every_file_under_its_import_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.endswith((".py", *OTHER["configs"], *OTHER["slurm"]))}
    assert inside == set(installed_names())


def test_the_installed_wheel_and_hugging_face_kernels_do_not_hide_each_other(wheel, tmp_path):
    pytest.importorskip("kernels", exc_type=ImportError)
    environment, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=elsewhere)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    # torch and the rest come from where the tests run; a path in a .pth file does not activate the editable install there
    (packages / "host.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    assert Path(run(python, "-c", BOTH, cwd=elsewhere).strip()) == packages / "titans_pretrain"
    for command in ("titans-pretrain", "titans-data"):
        assert f"usage: {command}" in run(environment / "bin" / command, "--help", cwd=elsewhere)
    name = "from titans_pretrain.config import load_config; print(load_config('340m-mag').run.name)"
    assert run(python, "-c", name, cwd=elsewhere) == "340m-mag\n"


def test_neither_is_hidden_in_the_repository_itself():
    pytest.importorskip("kernels", exc_type=ImportError)
    assert Path(run(sys.executable, "-c", BOTH, cwd=ROOT).strip()) == ROOT / "titans_pretrain"


def test_without_hugging_face_kernels_the_folder_is_not_taken_for_it():
    """A namespace package (no __init__.py) yields to any installed package, and transformers counts it as absent."""
    spec = importlib.machinery.PathFinder.find_spec("kernels", [str(ROOT)])
    assert spec.origin is None
