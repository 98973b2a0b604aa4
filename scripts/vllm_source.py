"""vLLM's Python source as a tree that is read, never imported.

What a name is, which parameters a function takes, which attributes a class has: enough
to tell whether a version that is not installed still has what the plugin uses.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm-emssd"
PACKAGE = "vllm"
Function = ast.FunctionDef | ast.AsyncFunctionDef
ANY_LINUX = "manylinux_2_28_x86_64"  # the Python files are the same in all wheels


def fetch(version: str) -> tuple[str, Path]:
    """A version's Python files from the package index: its number, and the folder that
    holds `vllm/`. "latest" is the newest release. Kept in `CACHE`.

    Raises: RuntimeError where the index does not have it.
    """
    if version == "latest":
        version = newest_release()
    kept = CACHE / f"vllm-{version}"
    if (kept / PACKAGE).is_dir():
        return version, kept
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        _pip("download", f"--dest={folder}", f"{PACKAGE}=={version}")
        (wheel,) = Path(folder).glob("*.whl")
        unpacked = Path(folder) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            sources = [n for n in archive.namelist() if n.endswith(".py")]
            archive.extractall(unpacked, sources)
        unpacked.rename(kept)
    return version, kept


def newest_release() -> str:
    report = _pip(
        *("install", "--dry-run", "--ignore-installed", "--target=unused"),
        *("--report=-", PACKAGE),
    )
    (install,) = json.loads(report)["install"]
    return install["metadata"]["version"]


def _pip(command: str, *args: str) -> str:
    """For vLLM alone, as a wheel for Linux, whatever machine this is."""
    which = ["--no-deps", "--only-binary=:all:", f"--platform={ANY_LINUX}"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", *which, *args],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"pip {command} {args[-1]}: {done.stderr.strip()[-500:]}")
    return done.stdout


@dataclass(frozen=True)
class Definition:
    """A name of a module, where it is really defined."""

    module: str
    name: str
    node: ast.AST

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef)


@dataclass(frozen=True)
class Attribute:
    owner: Definition  # the class that binds it
    node: ast.AST
    method: ast.AST | None  # in which `self.name` is set, None in the class body


@dataclass(frozen=True)
class Parameters:
    """Of a function, `self` included."""

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...]
    optional: frozenset[str]  # those with a default
    takes_more_positional: bool
    takes_more_keywords: bool

    @classmethod
    def of(cls, function: Function) -> Parameters:
        args = function.args
        positional = [a.arg for a in (*args.posonlyargs, *args.args)]
        keyword_only = [a.arg for a in args.kwonlyargs]
        has_default = positional[len(positional) - len(args.defaults) :] + [
            name
            for name, default in zip(keyword_only, args.kw_defaults, strict=True)
            if default is not None
        ]
        return cls(
            tuple(positional),
            tuple(keyword_only),
            frozenset(has_default),
            args.vararg is not None,
            args.kwarg is not None,
        )

    def __str__(self) -> str:
        return ", ".join(self.positional + self.keyword_only)

    def accepts_what(self, stock: Parameters) -> bool:
        """Whether an override with these parameters takes every call of stock's."""
        ours, theirs = self.positional, stock.positional
        if ours != theirs[: len(ours)]:
            return False
        rest_fits = len(ours) == len(theirs) or (
            self.takes_more_positional and self.takes_more_keywords
        )
        keywords_fit = self.takes_more_keywords or set(stock.keyword_only) <= set(
            self.keyword_only
        )
        return rest_fits and keywords_fit

    def misfit(self, call: ast.Call, is_bound: bool) -> str | None:
        """Why a call does not fit, or None. `is_bound`: self is not among its args."""
        positional = self.positional[1:] if is_bound else self.positional
        known = {*positional, *self.keyword_only}
        keywords = {k.arg for k in call.keywords if k.arg is not None}
        if not self.takes_more_keywords and not keywords <= known:
            return f"has no parameter {', '.join(sorted(keywords - known))}"
        if any(isinstance(a, ast.Starred) for a in call.args):
            return None
        if len(call.args) > len(positional) and not self.takes_more_positional:
            return f"takes {len(positional)} positional arguments, got {len(call.args)}"
        given = {*positional[: len(call.args)], *keywords}
        missing = known - given - self.optional
        if missing and not any(k.arg is None for k in call.keywords):
            return f"needs {', '.join(sorted(missing))} too"
        return None


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


class SourceTree:
    """The packages in some folders, as one."""

    def __init__(self, *roots: Path) -> None:
        self.roots = roots

    def path_of(self, module: str) -> Path | None:
        for root in self.roots:
            path = root.joinpath(*module.split("."))
            for candidate in (path.with_suffix(".py"), path / "__init__.py"):
                if candidate.is_file():
                    return candidate
        return None

    @cache  # noqa: B019  trees live as long as the program
    def names(self, module: str) -> dict[str, ast.AST]:
        """What a module binds at its top level, also below `if` and `try`."""
        path = self.path_of(module)
        if path is None:
            return {}
        return dict(_bindings(parse(path)))

    def find(self, module: str, name: str) -> Definition | None:
        """Follows imports to where the name is defined; None where it is not."""
        for _ in range(20):
            if self.path_of(f"{module}.{name}"):
                return Definition(f"{module}.{name}", "", ast.Module([], []))
            node = self.names(module).get(name)
            if node is None:
                return self._star_imported(module, name) or self._lazily_exported(
                    module, name
                )
            if not isinstance(node, ast.ImportFrom):
                return Definition(module, name, node)
            source = self._source_of(module, node)
            if self.path_of(source.split(".")[0]) is None:
                return Definition(source, name, node)
            original = {a.asname or a.name: a.name for a in node.names}
            module, name = source, original[name]
        return None

    def _star_imported(self, module: str, name: str) -> Definition | None:
        path = self.path_of(module)
        for node in parse(path).body if path else ():
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                found = self.find(self._source_of(module, node), name)
                if found is not None:
                    return found
        return None

    def _lazily_exported(self, module: str, name: str) -> Definition | None:
        """Names behind a module's `__getattr__`, told by a table of strings."""
        if "__getattr__" not in self.names(module):
            return None
        path = self.path_of(module)
        assert path is not None
        found = re.search(rf'"{name}": "([\w.]+)?:?(\w+)"', path.read_text())
        if found is None:
            return None
        source = (found[1] or "").lstrip(".")
        return self.find(f"{module}.{source}" if source else module, found[2])

    def _source_of(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return str(node.module)
        path = self.path_of(module)
        assert path is not None
        parts = module.split(".")
        parts = parts if path.name == "__init__.py" else parts[:-1]
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, node.module] if node.module else parts)

    # ------------------------------------------------------------ classes

    def bases(self, cls: Definition) -> list[Definition]:
        """The class's bases inside the tree."""
        assert isinstance(cls.node, ast.ClassDef)
        found = [self.find_expression(cls.module, base) for base in cls.node.bases]
        return [base for base in found if base is not None and base.is_class]

    def find_expression(self, module: str, node: ast.expr) -> Definition | None:
        """What `Name` or `module.Name` means in a module; strings are parsed."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.Subscript):
            node = node.value
        if isinstance(node, ast.Name):
            return self.find(module, node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = self.find(module, node.value.id)
            return self.find(owner.module, node.attr) if owner else None
        return None

    def lineage(self, cls: Definition) -> list[Definition]:
        """The class and all it inherits from in the tree, nearest first."""
        seen = [cls]
        for base in self.bases(cls):
            seen += [c for c in self.lineage(base) if c not in seen]
        return seen

    def is_closed(self, cls: Definition) -> bool:
        """Whether all attributes of a class are told by the tree: no base outside it,
        but for those that add no attributes of interest."""
        harmless = {"ABC", "Module", "Generic", "Protocol", "object", "Struct"}
        for one in self.lineage(cls):
            assert isinstance(one.node, ast.ClassDef)
            for base in one.node.bases:
                found = self.find_expression(one.module, base)
                name = ast.unparse(base).split("[")[0].split(".")[-1]
                if (found is None or not found.is_class) and name not in harmless:
                    return False
        return True

    def method(self, cls: Definition, name: str) -> Function | None:
        """Also an inherited one."""
        found = (self.own_method(one, name) for one in self.lineage(cls))
        return next((method for method in found if method is not None), None)

    def own_method(self, cls: Definition, name: str) -> Function | None:
        assert isinstance(cls.node, ast.ClassDef)
        for node in cls.node.body:
            if isinstance(node, Function) and node.name == name:
                return node
        return None

    def attribute(self, cls: Definition, name: str) -> Attribute | None:
        """Where a class or an instance of it gets an attribute."""
        for one in self.lineage(cls):
            found = _attributes(one.node).get(name)
            if found is not None:
                return Attribute(one, *found)
        return None

    def parameters(self, found: Definition) -> Parameters | None:
        """Of a function, or of a class's constructor; None where they are not told."""
        node: ast.AST | None = found.node
        if isinstance(node, ast.ClassDef):
            node = self.method(found, "__init__") or node
        if isinstance(node, Function):
            return Parameters.of(node)
        if isinstance(node, ast.ClassDef) and "dataclass" in _decorators(node):
            return self._dataclass_parameters(found)
        return None

    def _dataclass_parameters(self, cls: Definition) -> Parameters:
        fields: dict[str, bool] = {}  # name -> has a default
        for one in reversed(self.lineage(cls)):
            assert isinstance(one.node, ast.ClassDef)
            for node in one.node.body:
                if isinstance(node, ast.AnnAssign) and isinstance(
                    node.target, ast.Name
                ):
                    fields[node.target.id] = node.value is not None
        optional = frozenset(name for name, default in fields.items() if default)
        return Parameters(("self", *fields), (), optional, False, False)


def _bindings(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.asname or a.name.split(".")[0], node) for a in node.names)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                yield from ((n.id, node) for n in ast.walk(target) if _is_name(n))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _bindings(node)


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


@cache
def _attributes(cls: ast.AST) -> dict[str, tuple[ast.AST, ast.AST | None]]:
    """Name -> node and method, of what a class body binds and what its methods set on
    `self`. What tells a type wins: annotated, then constructed, then the first."""
    assert isinstance(cls, ast.ClassDef)
    found: dict[str, tuple[ast.AST, ast.AST | None]] = {
        name: (node, None) for name, node in _bindings(cls)
    }
    for method in cls.body:
        for node in ast.walk(method):
            for name in _set_on_self(node):
                if name not in found or _tells_type(node) > _tells_type(found[name][0]):
                    found[name] = node, method
    return found


def _set_on_self(node: ast.AST) -> Iterator[str]:
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = [t for target in node.targets for t in _flat(target)]
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    for target in targets:
        if (
            isinstance(target, ast.Attribute)
            and isinstance(target.value, ast.Name)
            and target.value.id == "self"
        ):
            yield target.attr


def _tells_type(node: ast.AST) -> int:
    if isinstance(node, ast.AnnAssign | ast.FunctionDef):
        return 2
    return int(
        isinstance(node, ast.Assign) and not isinstance(node.value, ast.Constant)
    )


def _decorators(cls: ast.ClassDef) -> str:
    return " ".join(map(ast.unparse, cls.decorator_list))


def _flat(target: ast.expr) -> list[ast.expr]:
    if isinstance(target, ast.Tuple | ast.List):
        return [one for element in target.elts for one in _flat(element)]
    return [target]
