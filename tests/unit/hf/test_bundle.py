"""The model's sources in one flat folder: names, imports, and what does not survive the move."""

import ast
import re
import sys

import pytest

from titans_pretrain.hf import bundle
from titans_pretrain.hf.export import CODE


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package on disk that takes the place of this one: write(module, source)."""
    monkeypatch.setattr(bundle, "PACKAGE", "demo_package")
    monkeypatch.syspath_prepend(tmp_path)

    def write(module, source=""):
        path = tmp_path.joinpath(*module.split("."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(source)
        for parent in path.relative_to(tmp_path).parents[:-1]:
            (tmp_path / parent / "__init__.py").touch()

    yield write
    for name in [n for n in sys.modules if n.split(".")[0] == "demo_package"]:
        del sys.modules[name]


def test_names_and_imports_are_flattened(package):
    package(
        "demo_package.a.b",
        '"""Doc."""\nimport torch\nfrom demo_package.c.d import (\n    X,\n    Y as Z,\n)\n\nW = X\n',
    )
    package("demo_package.c.d", "def f():\n    from demo_package.c.e import V\n    return V\n\nX = Y = 1\n")
    package("demo_package.c.e", "V = 2\n")
    sources = bundle.bundle_sources("demo_package.c.e", "demo_package.a.b")
    assert list(sources) == ["a_b.py", "c_d.py", "c_e.py"]
    assert sources["a_b.py"].startswith('"""Doc."""\nimport torch\nfrom .c_d import X, Y as Z\n\nW = X\n')
    assert sources["c_d.py"] == "def f():\n    from .c_e import V\n    return V\n\nX = Y = 1\n"
    # what transformers opens names every file that it needs, also those that it imports only through others
    assert named(sources["a_b.py"]) == ["c_d", "c_e"]
    assert not named(sources["c_e.py"])
    assert named(bundle.bundle_sources("demo_package.c.d", "demo_package.a.b")["c_d.py"]) == ["c_e"]


def named(source):
    return re.findall(r"^\s*from \.(\w+) import __name__", source, re.MULTILINE)


def test_an_imported_module_stays_a_module(package):
    package("demo_package.c.d", "X = 1\n")
    package("demo_package.c.e", "Y = 1\n")
    package("demo_package.a", "from demo_package.c import d, e as f\n\nZ = d.X + f.Y\n")
    sources = bundle.bundle_sources("demo_package.a")
    assert sources["a.py"].startswith("from . import c_d as d\nfrom . import c_e as f\n\nZ = d.X + f.Y\n")
    assert "c_d.py" in sources and "c_e.py" in sources


@pytest.mark.parametrize(
    "statement", ["import demo_package.c", "from .c import X", "import numpy", "from einops import rearrange"]
)
def test_an_import_that_cannot_move_is_refused(package, statement):
    package("demo_package.c", "X = 1\n")
    package("demo_package.a", f"X = 1\n\ndef f():\n    {statement}\n")
    with pytest.raises(ValueError, match=r"^demo_package.a, line 4: an exported folder cannot import"):
        bundle.bundle_sources("demo_package.a")


def test_the_model_moves_whole():
    sources = bundle.bundle_sources(*CODE)
    assert {"modeling_titans.py", "configuration_titans.py", "models.py", "config_model.py"} <= set(sources)
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                target = [node.module] if node.module else [alias.name for alias in node.names]
                assert all(f"{module}.py" in sources for module in target), (name, ast.unparse(node))
            elif isinstance(node, ast.Import | ast.ImportFrom):
                assert "titans_pretrain" not in ast.unparse(node), (name, ast.unparse(node))
