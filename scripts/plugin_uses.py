"""What the plugin uses of vLLM, held against a source tree of vLLM.

Told from the plugin's own source: imported names; hooks and their signatures; methods
that override vLLM's; attributes and calls of objects whose class is known from an
annotation, a constructor or `self`. What cannot be told is not judged.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.source_types import Scope, is_vllm
from scripts.vllm_source import Definition, Function, Parameters, SourceTree, parse

REPOSITORY = Path(__file__).resolve().parent.parent
PLUGIN = "vllm_emssd"


@dataclass(frozen=True)
class Problem:
    where: str  # file:line
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class HookSource:
    """A `Hook(...)` as it is written."""

    target: str
    signature: str
    patch: str
    where: str


@dataclass(frozen=True, order=True)
class Override:
    cls: str
    method: str
    where: str


class PluginUses:
    """The plugin's modules beside one vLLM tree: the folders that hold `vllm/`, of
    which the first that has a module counts."""

    def __init__(self, *vllm_roots: Path, plugin_root: Path = REPOSITORY) -> None:
        self.tree = SourceTree(plugin_root, *vllm_roots)
        self._root = plugin_root
        self.files = sorted((plugin_root / PLUGIN).rglob("*.py"))

    def modules(self) -> Iterator[tuple[str, Path, ast.Module]]:
        for path in self.files:
            parts = path.relative_to(self._root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield name, path, parse(path)

    def problems(self) -> list[Problem]:
        return [
            *self.missing_imports(),
            *self.changed_hooks(),
            *self.misfitting_overrides(),
            *self.misfitting_expressions(),
        ]

    def _where(self, path: Path, node: ast.AST) -> str:
        line = getattr(node, "lineno", 0)
        return f"{path.relative_to(self._root)}:{line}"

    # ------------------------------------------------------------ imports

    def imports(self) -> Iterator[tuple[str, str, str]]:
        """Module, name, place of each `from vllm... import name`, but for those that
        the code itself expects to fail."""
        for _, path, tree in self.modules():
            expected = _expected_to_fail(tree)
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.ImportFrom)
                    and is_vllm(str(node.module))
                    and node not in expected
                ):
                    for alias in node.names:
                        yield str(node.module), alias.name, self._where(path, node)

    def missing_imports(self) -> Iterator[Problem]:
        for module, name, where in self.imports():
            if self.tree.find(module, name) is None:
                yield Problem(where, f"{module} has no {name}")

    # ------------------------------------------------------------ hooks

    def hooks(self) -> list[HookSource]:
        return [
            HookSource(
                target=_constant(keywords["target"]),
                signature=_constant(keywords["signature"]),
                patch=_constant(keywords["patch"]) if "patch" in keywords else "",
                where=self._where(path, node),
            )
            for _, path, tree in self.modules()
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] == "Hook"
            and "target" in (keywords := {k.arg: k.value for k in node.keywords})
        ]

    def changed_hooks(self) -> Iterator[Problem]:
        for hook in self.hooks():
            found = self._target_parameters(hook.target)
            if found is None:
                yield Problem(hook.where, f"hook {hook.target}: is missing")
            elif str(found) != hook.signature:
                yield Problem(
                    hook.where,
                    f"hook {hook.target}: takes ({found}), expected ({hook.signature})",
                )

    def _target_parameters(self, target: str) -> Parameters | None:
        """As `inspect.signature` names them: a constructor's without `self`."""
        module, _, path = target.partition(":")
        name, *inner = path.split(".")
        found = self.tree.find(module, name)
        if found is None:
            return None
        if inner:
            method = self.tree.method(found, inner[0]) if found.is_class else None
            return Parameters.of(method) if method else None
        parameters = self.tree.parameters(found)
        if parameters is not None and found.is_class:
            return Parameters(
                parameters.positional[1:],
                parameters.keyword_only,
                parameters.optional,
                parameters.takes_more_positional,
                parameters.takes_more_keywords,
            )
        return parameters

    # ------------------------------------------------------------ overrides

    def classes(self) -> Iterator[tuple[Definition, Path]]:
        """Our classes that have one of vLLM's among their bases."""
        for module, path, tree in self.modules():
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    cls = Definition(module, node.name, node)
                    if any(is_vllm(c.module) for c in self.tree.lineage(cls)):
                        yield cls, path

    def _overridden(self) -> Iterator[tuple[Override, Function, Function]]:
        for cls, path in self.classes():
            assert isinstance(cls.node, ast.ClassDef)
            stock = [c for c in self.tree.lineage(cls) if is_vllm(c.module)]
            for ours in cls.node.body:
                if not isinstance(ours, Function):
                    continue
                found = (self.tree.method(c, ours.name) for c in stock)
                theirs = next((m for m in found if m is not None), None)
                if theirs is not None:
                    place = self._where(path, ours)
                    yield Override(cls.name, ours.name, place), ours, theirs

    def overrides(self) -> set[tuple[str, str]]:
        """Class and method, of ours that take the place of vLLM's."""
        return {(o.cls, o.method) for o, _, _ in self._overridden()}

    def misfitting_overrides(self) -> Iterator[Problem]:
        for override, ours, theirs in self._overridden():
            taken, given = Parameters.of(ours), Parameters.of(theirs)
            if not taken.accepts_what(given):
                yield Problem(
                    override.where,
                    f"{override.cls}.{override.method} takes ({taken}), "
                    f"vLLM's ({given})",
                )

    # ------------------------------------------------------------ expressions

    def misfitting_expressions(self) -> Iterator[Problem]:
        for path, function, scope in self._scopes():
            for node in ast.walk(function):
                if what := scope.misfit(node):
                    yield Problem(self._where(path, node), what)

    def num_judged(self) -> int:
        """Attributes and calls of vLLM's classes that were looked up."""
        return sum(
            scope.is_judged(node)
            for _, function, scope in self._scopes()
            for node in ast.walk(function)
        )

    def _scopes(self) -> Iterator[tuple[Path, Function, Scope]]:
        """Every function of the plugin, with its file and what its names are."""
        for module, path, tree in self.modules():
            for function, cls in _functions(tree):
                owner = cls and Definition(module, cls.name, cls)
                yield path, function, Scope(self.tree, module, function, owner)


def _functions(tree: ast.Module) -> Iterator[tuple[Function, ast.ClassDef | None]]:
    for node in tree.body:
        if isinstance(node, Function):
            yield node, None
        elif isinstance(node, ast.ClassDef):
            yield from ((m, node) for m in node.body if isinstance(m, Function))


def _expected_to_fail(tree: ast.Module) -> set[ast.AST]:
    """Imports in a `try` that catches ImportError."""
    return {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.Try)
        and any(h.type and "ImportError" in ast.unparse(h.type) for h in block.handlers)
        for statement in block.body
        for node in ast.walk(statement)
    }


def _constant(node: ast.expr) -> str:
    value = ast.literal_eval(node)
    assert isinstance(value, str)
    return value
