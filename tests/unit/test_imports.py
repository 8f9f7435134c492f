"""Which part of the stack may import which: downwards only, and no two files each other. Imports inside functions count,
those for type checkers only do not."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
# From the bottom up. Those on one line know nothing of each other.
ORDER = (
    {"config", "kernels", "disk"},
    {"models", "data"},
    {"checkpoint", "data_prep"},
    {"hf"},
    {"training"},
    {"parallel", "forecasting", "genomics"},
    {"evaluation"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}


def sources() -> dict[str, Path]:
    """Module, without `titans_pretrain.` -> its file."""
    found = {}
    for folder, prefix in (("titans_pretrain", ()), ("kernels", ("kernels",)), ("data_prep", ("data_prep",))):
        for path in (ROOT / folder).rglob("*.py"):
            parts = (*prefix, *path.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found[""]  # the package itself stands above all: it gives out their names
    return found


def imports(path: Path, modules) -> set[str]:
    """Those of `modules` that a file imports; of a package's name, its file if there is one."""
    found, tree = set(), ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                found.add(whole if whole.removeprefix("titans_pretrain.") in modules else node.module)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name.removeprefix("titans_pretrain.") for name in found if name.startswith("titans_pretrain.")} & set(
        modules
    )


def test_parts_import_downwards():
    modules = sources()
    assert {name.split(".")[0] for name in modules} == RANK.keys()
    for name, path in modules.items():
        part = name.split(".")[0]
        others = {other.split(".")[0] for other in imports(path, modules)} - {part}
        upwards = {other for other in others if RANK[other] >= RANK[part]}
        assert not upwards, f"{name} imports {', '.join(sorted(upwards))}"


def test_no_two_files_import_each_other():
    modules = sources()
    graph = {name: imports(path, modules) - {name} for name, path in modules.items()}
    while leaves := {name for name, others in graph.items() if not others}:
        graph = {name: others - leaves for name, others in graph.items() if name not in leaves}
    assert not graph, f"a circle among {', '.join(sorted(graph))}"
