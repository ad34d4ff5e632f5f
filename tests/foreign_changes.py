"""Finds where code changes objects that are not the package's own: modules, classes and instances of other libraries.

A change is an attribute that is set or deleted (by a statement, setattr, delattr or `__setattr__`), or an entry of an
object's namespace (vars(x), x.__dict__, x._parameters, sys.modules ...). The object is the package's own if it is

    self or cls in a class of the package, or a function or class that the code itself defines;
    made there by a call of a class, or the `ctx` of an autograd.Function;
    a value whose annotation, or whose function's return annotation, names a class of the package;
    checked there by isinstance with a class of the package.

Marks of the package, `x._qlora_...`, may be put on anything. Types are read from the text, so a value whose type the
text does not show counts as foreign: annotate it.
"""

import ast
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MARK = "_qlora_"
STATE = {"data", "training"}  # a tensor's content and a module's mode: state, not code
NAMESPACES = {"__dict__", "_parameters", "_buffers", "_modules", "modules"}  # the last one: sys.modules
MUTATE = {"pop", "update", "clear", "setdefault", "popitem", "__setitem__", "__delitem__"}
SAME_ITEMS = {"values", "items", "get", "pop", "copy"}  # methods of a container
SAME_ITEMS_AS_ARGUMENT = {"next", "iter", "list", "tuple", "set", "sorted", "reversed", "zip", "enumerate", "deepcopy"}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSION = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)


class Change(NamedTuple):
    """One change: its line and its text."""

    line: int
    text: str


class Package:
    """What the package defines: classes, functions that return their instances, fields that hold them, constants."""

    def __init__(self, trees: list[ast.Module]) -> None:
        nodes = [node for tree in trees for node in ast.walk(tree)]
        self.classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        self.functions = {n.name for n in nodes if isinstance(n, FUNCTION) and self.names_class(n.returns)}
        self.fields: set[str] = set()
        self.constants: dict[str, Any] = {}
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
                self.fields |= {ast.unparse(f.target) for f in fields if self.names_class(f.annotation)}
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                self.constants |= {ast.unparse(name): node.value.value for name in node.targets}
        for tree in trees:
            for node, scope in walk(tree, Scope(self)):
                if isinstance(node, (ast.Assign, ast.AnnAssign)):
                    own = self.names_class(getattr(node, "annotation", None)) or scope.own(node.value)
                    targets = [ast.unparse(target) for target in targets_of(node) if own]
                    self.fields |= {text.removeprefix("self.") for text in targets if text.startswith("self.")}

    def names_class(self, annotation: ast.AST | None) -> bool:
        """Whether an annotation names a class of the package."""
        words = [] if annotation is None else list(ast.walk(annotation))
        quoted = [w.value for w in words if isinstance(w, ast.Constant) and isinstance(w.value, str)]
        words += [word for text in quoted for word in ast.walk(ast.parse(text))]
        return any(getattr(word, "id", getattr(word, "attr", None)) in self.classes for word in words)


class Scope:
    """The names of a function (or file, class, comprehension), and what the text says of their values."""

    def __init__(self, package: Package, outer: "Scope | None" = None, of_class: bool = False) -> None:
        self.package = package
        self.outer = outer
        self.of_class = of_class
        self.values: dict[str, list[ast.AST | bool | None]] = {}  # True: the package's own
        self.checked: dict[str, int] = {}  # name -> line from which on it was checked by isinstance

    def bind(self, target: ast.AST, value: ast.AST | bool | None) -> None:
        """Note that a name, or each name of a tuple, gets a value."""
        values: list[Any] = []
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            values = value.elts
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            values = {"zip": value.args, "enumerate": [False, *value.args]}.get(value.func.id, [])
        if values:
            for one, its in zip(target.elts, values, strict=False):
                self.bind(one, its)
            return
        for name in ast.walk(target):
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                self.values.setdefault(name.id, []).append(value)

    def bind_function(self, function: Any, is_method: bool) -> None:
        """Note the arguments of a function, and what its statements give to names."""
        a = function.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
        for place, argument in enumerate(arguments):
            is_own = place == 0 and (argument.arg == "ctx" or (is_method and argument.arg in {"self", "cls"}))
            self.values[argument.arg] = [is_own or self.package.names_class(argument.annotation)]
        for node in _statements(function):
            if isinstance(node, ast.AnnAssign):
                self.bind(node.target, self.package.names_class(node.annotation) or node.value)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self.bind(target, node.value)
            elif isinstance(node, ast.For):
                self.bind(node.target, node.iter)
            elif isinstance(node, ast.NamedExpr):
                self.bind(node.target, node.value)
            elif isinstance(node, ast.withitem) and node.optional_vars is not None:
                self.bind(node.optional_vars, node.context_expr)
            elif isinstance(node, ast.Assert):
                self.check(node.test, node.lineno)
            elif isinstance(node, ast.If) and isinstance(node.test, ast.UnaryOp):  # if not isinstance(...): return
                leaves = isinstance(node.body[-1], (ast.Continue, ast.Return, ast.Raise))
                if leaves and isinstance(node.test.op, ast.Not):
                    self.check(node.test.operand, node.body[-1].lineno)

    def check(self, test: ast.AST, line: int = 0) -> None:
        """Note the names of which isinstance says, in a condition that holds, that they are the package's own."""
        for part in test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]:
            if not (isinstance(part, ast.Call) and ast.unparse(part.func) == "isinstance"):
                continue
            if isinstance(part.args[0], ast.Name) and ast.unparse(part.args[1]) in self.package.classes:
                self.checked[part.args[0].id] = line

    def own_name(self, name: str, line: int) -> bool:
        """Whether every value that a name gets is the package's own."""
        if self.checked.get(name, math.inf) <= line:
            return True
        if name not in self.values:
            return self.outer is not None and self.outer.own_name(name, line)
        values, self.values[name] = self.values[name], [False]  # x = f(x) says nothing of x
        some = [v for v in values if not _is_empty(v)]
        own = bool(some) and all(v if isinstance(v, bool) else self.own(v) for v in some)
        self.values[name] = values
        return own

    def own(self, node: ast.AST | None) -> bool:
        """Whether the text shows that a value, or what it contains, is the package's own or is made here."""
        if isinstance(node, ast.Name):
            return self.own_name(node.id, node.lineno)
        if isinstance(node, (ast.Subscript, ast.Starred, ast.NamedExpr)):
            return self.own(node.value)
        if isinstance(node, ast.Attribute):
            return node.attr in self.package.fields and self.own(node.value)
        if isinstance(node, ast.IfExp):
            return all(self.own(part) for part in (node.body, node.orelse) if not _is_empty(part))
        if isinstance(node, (ast.Tuple, ast.List)):
            return bool(node.elts) and all(map(self.own, node.elts))
        if isinstance(node, COMPREHENSION):
            return self.inside(node).own(node.value if isinstance(node, ast.DictComp) else node.elt)
        if not isinstance(node, ast.Call):
            return False
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if isinstance(node.func, ast.Attribute) and name in SAME_ITEMS:
            return self.own(node.func.value)
        if name in SAME_ITEMS_AS_ARGUMENT:
            return any(map(self.own, node.args))
        return name in {"cls", "__new__"} | self.package.functions or name.lstrip("_")[:1].isupper()

    def namespace_owner(self, node: ast.AST | None) -> ast.AST | None:
        """X, if an expression is the namespace of x: vars(x), x.__dict__, a name that gets one of these."""
        if isinstance(node, ast.Name):
            found = [
                self.namespace_owner(value) for value in self.values.get(node.id, []) if isinstance(value, ast.AST)
            ]
            return next(filter(None, found), None)
        if isinstance(node, COMPREHENSION) and not isinstance(node, ast.DictComp):
            return self.inside(node).namespace_owner(node.elt)
        if isinstance(node, ast.Attribute) and node.attr in NAMESPACES:
            return node.value
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in {"vars", "globals"}:
                return node.args[0] if node.args else node.func
            if node.func.id == "getattr" and self.text_of(node.args[1]) in NAMESPACES:
                return node.args[0]
        return None

    def inside(self, node: Any) -> "Scope":
        """The names of a comprehension."""
        inner = Scope(self.package, self)
        for generator in node.generators:
            inner.bind(generator.target, generator.iter)
            for condition in generator.ifs:
                inner.check(condition)
        return inner

    def text_of(self, node: ast.AST) -> Any:
        """The value of a constant, or of a constant's name."""
        return node.value if isinstance(node, ast.Constant) else self.package.constants.get(ast.unparse(node))


def walk(node: ast.AST, scope: Scope) -> Iterator[tuple[ast.AST, Scope]]:
    """Every node, with the scope it stands in."""
    for child in ast.iter_child_nodes(node):
        inner = scope
        if isinstance(child, (*FUNCTION, ast.ClassDef)):
            scope.values.setdefault(child.name, []).append(True)
        if isinstance(child, (*FUNCTION, ast.ClassDef, ast.Lambda)):
            inner = Scope(scope.package, scope, isinstance(child, ast.ClassDef))
        if isinstance(child, (*FUNCTION, ast.Lambda)):
            inner.bind_function(child, scope.of_class)
        if isinstance(child, COMPREHENSION):
            inner = scope.inside(child)
        if isinstance(child, ast.If):
            branch = Scope(scope.package, scope)
            branch.check(child.test)
            yield from walk(ast.Module(child.body, []), branch)
            child = ast.Module([ast.Expr(child.test), *child.orelse], [])
        yield child, inner
        yield from walk(child, inner)


def _is_empty(node: Any) -> bool:
    """Whether an expression is None, () or []."""
    return (isinstance(node, ast.Constant) and node.value is None) or getattr(node, "elts", None) == []


def _statements(function: ast.AST) -> Iterator[ast.AST]:
    """What is in a function, without the functions, classes and comprehensions in it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, (*FUNCTION, ast.ClassDef, ast.Lambda, *COMPREHENSION)):
            yield child
            yield from _statements(child)


def targets_of(node: ast.AST) -> Iterator[ast.AST]:
    """What a node sets or deletes, tuples taken apart."""
    targets: list[Any] = []
    if isinstance(node, (ast.Assign, ast.Delete)):
        targets = [*node.targets]
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.For, ast.comprehension)):
        targets = [node.target]
    elif isinstance(node, ast.withitem):
        targets = [node.optional_vars]
    while targets:
        target = targets.pop(0)
        if isinstance(target, (ast.Tuple, ast.List)):
            targets += target.elts
        elif target is not None:
            yield target.value if isinstance(target, ast.Starred) else target


def _changed(node: ast.AST, scope: Scope) -> Iterator[tuple[ast.AST | None, Any, Any]]:
    """(object, attribute if known, where) of what one node changes."""
    for target in targets_of(node):
        if isinstance(target, ast.Attribute):
            yield target.value, target.attr, target
        elif isinstance(target, ast.Subscript) and (owner := scope.namespace_owner(target.value)) is not None:
            yield owner, scope.text_of(target.slice), target
    if not isinstance(node, ast.Call):
        return
    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
    if name in {"setattr", "delattr"}:
        yield node.args[0], scope.text_of(node.args[1]), node
    elif not isinstance(node.func, ast.Attribute):
        return
    elif name in {"__setattr__", "__delattr__"} and ast.unparse(node.func.value) != "super()":
        of_class = len(node.args) > (2 if name == "__setattr__" else 1)  # object.__setattr__(x, name, value)
        yield (node.args[0] if of_class else node.func.value), None, node
    elif name in MUTATE and (owner := scope.namespace_owner(node.func.value)) is not None:
        yield owner, scope.text_of(node.args[0]) if node.args else None, node


def changes_in(tree: ast.Module, package: Package) -> list[Change]:
    """Every change of a foreign object in a file, in the order of its lines."""
    return sorted(
        {
            Change(at.lineno, ast.unparse(at))
            for node, scope in walk(tree, Scope(package))
            for owner, name, at in _changed(node, scope)
            if not str(name).startswith(MARK) and name not in STATE and not scope.own(owner)
        }
    )


@functools.cache
def changes_of(folder: Path) -> dict[str, list[Change]]:
    """File, relative to the package's folder -> its changes."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}
    package = Package(list(trees.values()))
    return {path.relative_to(folder).as_posix(): changes_in(tree, package) for path, tree in trees.items()}
