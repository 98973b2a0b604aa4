"""Imports go one way: core <- proposers <- integration <- bench <- simulate <- commands
<- cli; the first two do without vLLM."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vllm_emssd
from tests.fresh_process import python

PACKAGE = Path(vllm_emssd.__file__).parent
LAYERS = {  # all else: core, 0
    "proposers": 1,
    "integration": 2,
    "bench": 3,
    "simulate": 4,
    "commands": 5,
    "cli": 6,
    "__main__": 7,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int:
    return LAYERS.get([*module.split("."), ""][1], 0)


def imports_of(tree: ast.AST, module: str) -> Iterator[str]:
    """Modules that the code imports, in functions and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import, line {node.lineno}"
            yield str(node.module)
            yield from (f"{node.module}.{name.name}" for name in node.names)


def without_functions(tree: ast.Module) -> ast.Module:
    """What runs on import."""
    kept = [n for n in tree.body if not isinstance(n, ast.FunctionDef)]
    return ast.Module(body=kept, type_ignores=[])


def is_entry_point(path: Path) -> bool:
    """`register` has to reach up to integration, but only once it is called."""
    return path == PACKAGE / "__init__.py"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_one_way(path: Path) -> None:
    tree, module = ast.parse(path.read_text()), module_of(path)
    code = without_functions(tree) if is_entry_point(path) else tree
    for imported in imports_of(code, module):
        if imported.split(".")[0] == PACKAGE.name:
            assert layer_of(imported) <= layer_of(module), imported
        if layer_of(module) < LAYERS["integration"]:
            assert imported.split(".")[0] != "vllm"


def test_no_files_import_each_other() -> None:
    """Not for types either; `static_order` raises on a circle."""
    modules = {module_of(path): path for path in FILES if not is_entry_point(path)}
    imports = {
        module: set(imports_of(ast.parse(path.read_text()), module))
        & modules.keys() - {module}
        for module, path in modules.items()
    }
    assert set(TopologicalSorter(imports).static_order()) == modules.keys()


def test_every_layer_was_scanned() -> None:
    assert {layer_of(module_of(path)) for path in FILES} == {0, *LAYERS.values()}


def test_core_imports_without_vllm() -> None:
    modules = [
        module_of(path)
        for path in FILES
        if layer_of(module_of(path)) < LAYERS["integration"]
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'vllm'])"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "[]", done.stderr
