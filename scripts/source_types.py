"""The classes of names and expressions in a function, told without running it.

From annotations, constructors, `self`, `isinstance` and the attributes of classes whose
source is at hand. What cannot be told is not judged.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from scripts.vllm_source import Definition, Function, SourceTree


@dataclass(frozen=True)
class Annotated:
    """An annotation and the module whose names it uses."""

    module: str
    node: ast.expr


class Scope:
    """The classes of names and expressions in one function, as far as they are told."""

    def __init__(
        self,
        tree: SourceTree,
        module: str,
        function: Function,
        cls: Definition | None = None,
    ) -> None:
        self._tree = tree
        self._module = module
        self._cls = cls
        self._types: dict[str, Definition] = {}
        self._annotations: dict[str, Annotated] = {}
        self._imported: dict[str, Definition | None] = {}
        self._narrowed: dict[str, list[Definition]] = {}  # by isinstance
        arguments = [*function.args.posonlyargs, *function.args.args]
        if cls is not None and arguments:
            self._types[arguments[0].arg] = cls
        for argument in (*arguments, *function.args.kwonlyargs):
            if argument.annotation is not None:
                annotation = Annotated(module, argument.annotation)
                self._annotations[argument.arg] = annotation
                self._learn(argument.arg, self._class_of(annotation))
        for node in ast.walk(function):
            self._learn_from(node)

    def _learn_from(self, node: ast.AST) -> None:
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                found = self._tree.find(str(node.module), alias.name)
                self._imported[alias.asname or alias.name] = found
        elif isinstance(node, ast.Assign):
            for target, value in _pairs(node.targets[0], node.value):
                self._learn(target, self.type_of(value))
        elif isinstance(node, ast.For | ast.comprehension):
            if isinstance(node.target, ast.Name):
                self._learn(node.target.id, self._element_type(node.iter))
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "isinstance"
            and isinstance(node.args[0], ast.Name)
            and isinstance(node.args[1], ast.Name)
        ):
            found = self._lookup(node.args[1].id)
            if found is not None and found.is_class:
                self._narrowed.setdefault(node.args[0].id, []).append(found)
                self._learn(node.args[0].id, found)

    def _learn(self, name: str, cls: Definition | None) -> None:
        if cls is not None:
            self._types.setdefault(name, cls)

    def _lookup(self, name: str) -> Definition | None:
        return self._imported.get(name) or self._tree.find(self._module, name)

    # ------------------------------------------------------------ types

    def type_of(self, node: ast.expr) -> Definition | None:
        if isinstance(node, ast.Name):
            return self._types.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.type_of(node.value)
            return self._attribute_type(owner, node.attr) if owner else None
        if isinstance(node, ast.Subscript):
            return self._element_type(node.value)
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) == "super":
                return self._parent()
            called = self.called(node)
            if called is not None and called.is_class:
                return called
            if called is not None and isinstance(called.node, Function):
                returns = called.node.returns
                return returns and self._class_of(Annotated(called.module, returns))
        return None

    def _parent(self) -> Definition | None:
        if self._cls is None:
            return None
        for base in self._tree.bases(self._cls):
            if any(is_vllm(one.module) for one in self._tree.lineage(base)):
                return base
        return None

    def _class_of(self, annotation: Annotated) -> Definition | None:
        """None for containers and for unions of more than one class."""
        node = annotation.node
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.BinOp):  # X | None
            some = [s for s in (node.left, node.right) if ast.unparse(s) != "None"]
            if len(some) != 1:
                return None
            return self._class_of(Annotated(annotation.module, some[0]))
        if isinstance(node, ast.Subscript):
            return None
        found = self._tree.find_expression(annotation.module, node)
        return found if found is not None and found.is_class else None

    def _element_type(self, container: ast.expr) -> Definition | None:
        """Of `list[X]` and `Mapping[str, X]`."""
        annotation = self._annotation_of(container)
        if annotation is None or not isinstance(annotation.node, ast.Subscript):
            return None
        inner = annotation.node.slice
        if isinstance(inner, ast.Tuple):
            inner = inner.elts[-1]
        return self._class_of(Annotated(annotation.module, inner))

    def _annotation_of(self, node: ast.expr) -> Annotated | None:
        if isinstance(node, ast.Name):
            return self._annotations.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.type_of(node.value)
            found = self._tree.attribute(owner, node.attr) if owner else None
            if found is None:
                return None
            module = found.owner.module
            if isinstance(found.node, ast.AnnAssign):
                return Annotated(module, found.node.annotation)
            if isinstance(found.node, ast.Assign) and found.method is not None:
                return _parameter_annotation(module, found.node.value, found.method)
        return None

    def _attribute_type(self, cls: Definition, name: str) -> Definition | None:
        found = self._tree.attribute(cls, name)
        if found is None:
            return None
        node, module = found.node, found.owner.module
        if isinstance(node, ast.AnnAssign):
            return self._class_of(Annotated(module, node.annotation))
        if isinstance(node, Function) and node.returns is not None:
            is_property = any("property" in ast.unparse(d) for d in node.decorator_list)
            return (
                self._class_of(Annotated(module, node.returns)) if is_property else None
            )
        if isinstance(node, ast.Assign) and found.method is not None:
            return self._assigned_type(found.owner, node.value, found.method)
        return None

    def _assigned_type(
        self, owner: Definition, value: ast.expr, method: ast.AST
    ) -> Definition | None:
        """Of `self.x = X(...)`, `= self.make_x()`, `= parameter`, `= parameter.y`."""
        if isinstance(value, ast.Call):
            found = self._tree.find_expression(owner.module, value.func)
            if found is not None and found.is_class:
                return found
            if isinstance(value.func, ast.Attribute):
                maker = self._tree.method(owner, value.func.attr)
                is_own = ast.unparse(value.func.value) == "self"
                if is_own and maker is not None and maker.returns is not None:
                    return self._class_of(Annotated(owner.module, maker.returns))
            return None
        if isinstance(value, ast.Attribute):
            holder = self._assigned_type(owner, value.value, method)
            found_at = self._tree.attribute(holder, value.attr) if holder else None
            if found_at is None or not isinstance(found_at.node, ast.AnnAssign):
                return None
            annotation = Annotated(found_at.owner.module, found_at.node.annotation)
            return self._class_of(annotation)
        parameter = _parameter_annotation(owner.module, value, method)
        return self._class_of(parameter) if parameter else None

    def called(self, call: ast.Call) -> Definition | None:
        """The function, method or class that a call is of."""
        function = call.func
        if isinstance(function, ast.Name):
            return self._lookup(function.id)
        if isinstance(function, ast.Attribute):
            owner = self.type_of(function.value)
            for one in self._tree.lineage(owner) if owner else ():
                method = self._tree.own_method(one, function.attr)
                if method is not None:
                    return Definition(one.module, function.attr, method)
        return None

    # ------------------------------------------------------------ judging

    def is_judged(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute):
            return bool(self._judged_owner(node) or self._judged_module(node))
        if isinstance(node, ast.Call):
            called = self.called(node)
            return called is not None and is_vllm(called.module)
        return False

    def misfit(self, node: ast.AST) -> str | None:
        """What of vLLM's an expression asks for in vain."""
        if isinstance(node, ast.Attribute):
            owner = self._judged_owner(node)
            if owner is not None and not self._has(owner, node):
                return f"{owner.name} has no attribute {node.attr}"
            module = self._judged_module(node)
            if module is not None and self._tree.find(module, node.attr) is None:
                return f"{module} has no {node.attr}"
        if isinstance(node, ast.Call):
            called = self.called(node)
            if called is None or not is_vllm(called.module):
                return None
            parameters = self._tree.parameters(called)
            is_bound = called.is_class or isinstance(node.func, ast.Attribute)
            if parameters is not None and not _is_static(called.node):
                why = parameters.misfit(node, is_bound)
                return why and f"{called.name} {why}; it takes ({parameters})"
        return None

    def _has(self, owner: Definition, node: ast.Attribute) -> bool:
        name = node.value.id if isinstance(node.value, ast.Name) else ""
        classes = [owner, *self._narrowed.get(name, ())]
        return any(self._tree.attribute(one, node.attr) for one in classes)

    def _judged_module(self, node: ast.Attribute) -> str | None:
        """The module of vLLM's that is asked for a name."""
        if not isinstance(node.value, ast.Name) or self.type_of(node.value):
            return None
        found = self._lookup(node.value.id)
        is_module = found is not None and not found.name and is_vllm(found.module)
        return found.module if found is not None and is_module else None

    def _judged_owner(self, node: ast.Attribute) -> Definition | None:
        """The class asked for an attribute, where it is vLLM's or inherits from it."""
        owner = self.type_of(node.value)
        if owner is None or not isinstance(node.ctx, ast.Load):
            return None
        lineage = self._tree.lineage(owner)
        if not any(is_vllm(one.module) for one in lineage):
            return None
        if node.attr.startswith("__") or self._tree.method(owner, "__getattr__"):
            return None
        return owner if self._tree.is_closed(owner) else None


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, its in zip(target.elts, value.elts, strict=True):
            yield from _pairs(one, its)


def _parameter_annotation(
    module: str, value: ast.expr, method: ast.AST
) -> Annotated | None:
    """Of the method's parameter that `value` names."""
    if isinstance(value, ast.Name) and isinstance(method, Function):
        for argument in (*method.args.args, *method.args.kwonlyargs):
            if argument.arg == value.id and argument.annotation is not None:
                return Annotated(module, argument.annotation)
    return None


def is_vllm(module: str) -> bool:
    return module.split(".")[0] == "vllm"


def _is_static(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any("staticmethod" in ast.unparse(d) for d in decorators)
