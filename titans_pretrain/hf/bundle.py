"""Copies modules of this package into one flat folder that works without the package.

An exported model runs the very code it was trained with: there is no second implementation to keep in step. Hugging Face
transformers loads a model's code from files of one folder that import each other relatively; so
`titans_pretrain.kernels.memory_scan.state` becomes `kernels_memory_scan_state.py`, and
`from titans_pretrain.kernels.memory_scan.state import X` becomes `from .kernels_memory_scan_state import X`.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

PACKAGE = "titans_pretrain"
ALLOWED = {*sys.stdlib_module_names, "torch", "transformers", "safetensors"}  # what an exported folder may need

_ALL_FILES = """

from typing import TYPE_CHECKING  # noqa: E402

if TYPE_CHECKING:  # never run: transformers copies the files that this one names, and its first releases look no further
{imports}
"""


def bundle_sources(*modules: str) -> dict[str, str]:
    """{file name: source} of these modules and of everything of this package that they import.

    Transformers opens the first and the last of `modules`. Raises ValueError, which is a defect of the module that it
    names, for an import that does not survive the move: `import titans_pretrain...`, a relative one, or one of a package
    that an exported folder does not require.
    """
    sources = _with_imports(modules)
    for opened, needed in {modules[0]: _with_imports(modules[:1]), modules[-1]: sources}.items():
        entry = flat_name(opened)
        imports = "\n".join(f"    from .{name} import __name__ as _" for name in sorted(needed) if name != entry)
        if imports:
            sources = sources | {entry: sources[entry] + _ALL_FILES.format(imports=imports)}
    return {name + ".py": source for name, source in sorted(sources.items())}


def _with_imports(modules: Sequence[str]) -> dict[str, str]:
    """{flat name: source} of these modules and of everything of this package that they import."""
    sources: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if flat_name(module) not in sources:
            sources[flat_name(module)], imported = _flatten(module)
            waiting += imported
    return sources


def flat_name(module: str) -> str:
    """titans_pretrain.models.mac -> models_mac; the files of titans_pretrain.hf keep their own names."""
    return module.removeprefix(PACKAGE + ".").removeprefix("hf.").replace(".", "_")


def _flatten(module: str) -> tuple[str, list[str]]:
    """Source of a module with its imports of this package made relative, and the modules that it imports."""
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    imported = []
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in sorted(statements, key=lambda node: -node.lineno):  # from the end: line numbers before it stay
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            text, names = _relative(node)
            lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + line + "\n" for line in text]
            imported += names
        else:
            _check_allowed(module, node)
    return "".join(lines), imported


def _relative(node: ast.ImportFrom) -> tuple[list[str], list[str]]:
    """The import statement for the flat folder, line by line, and the modules that it needs."""
    package = importlib.import_module(node.module)
    lines, modules, names = [], [], []
    for alias in node.names:
        if isinstance(getattr(package, alias.name, ModuleType("")), ModuleType):  # also one not imported yet
            modules.append(f"{node.module}.{alias.name}")
            lines.append(f"from . import {flat_name(modules[-1])} as {alias.asname or alias.name}")
        else:
            names.append(ast.unparse(alias))
    if names:
        modules.append(node.module)
        lines.append(f"from .{flat_name(node.module)} import {', '.join(names)}")
    return lines, modules


def _check_allowed(module: str, node: ast.Import | ast.ImportFrom) -> None:
    names = (
        [alias.name for alias in node.names]
        if isinstance(node, ast.Import)
        else ["." * node.level + (node.module or "")]
    )
    for name in names:
        if name.partition(".")[0] not in ALLOWED:
            raise ValueError(
                f"{module}, line {node.lineno}: an exported folder cannot import {name!r}; write "
                f"`from {PACKAGE}.a.b import name`, and use no package but torch and the standard library"
            )
