"""Finds where code changes objects that are not the package's own: modules, classes and instances of other libraries.

A change is an attribute that is set or deleted (by a statement, setattr, delattr or `__setattr__`), or an entry of an
object's namespace (vars(x), x.__dict__, x._parameters, sys.modules ...). It is the package's own if the object is
`self`, `cls` or the `ctx` of an autograd.Function, or if the name is that of a field that a class of the package
declares or sets on itself, a mark of the package (`_qlora_...`), or state (`data`, `training`). A name that the text
does not show counts as foreign.
"""

import ast
import functools
from typing import NamedTuple

MARK = "_qlora_"
OWNERS = {"self", "cls", "ctx"}
STATE = {"data", "training"}  # a tensor's content and a module's mode: state, not code
NAMESPACES = {"__dict__", "_parameters", "_buffers", "_modules", "modules"}  # the last one: sys.modules
MUTATE = {"pop", "update", "clear", "setdefault", "popitem", "__setitem__", "__delitem__"}


class Change(NamedTuple):
    """One change: its line and its text."""

    line: int
    text: str


class Package:
    """The names of fields that classes of the package declare or set on themselves, and its constants."""

    def __init__(self, trees):
        self.fields = set()
        self.constants = {}
        for node in (node for tree in trees for node in ast.walk(tree)):
            if isinstance(node, ast.ClassDef):
                self.fields |= {ast.unparse(field.target) for field in node.body if isinstance(field, ast.AnnAssign)}
            for target in targets_of(node):
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    self.fields.add(target.attr)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                self.constants |= {ast.unparse(name): node.value.value for name in node.targets}

    def text_of(self, node):
        """The value of a constant, or of a constant's name."""
        return node.value if isinstance(node, ast.Constant) else self.constants.get(ast.unparse(node))

    def is_own(self, owner, name):
        known = str(name).startswith(MARK) or name in STATE | self.fields
        return known or ast.unparse(owner) in OWNERS


def targets_of(node):
    """What a node sets or deletes, tuples taken apart."""
    targets = []
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


def namespace_owner(node):
    """X, if an expression is the namespace of x."""
    if isinstance(node, ast.Attribute) and node.attr in NAMESPACES:
        return node.value
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"vars", "globals"}:
        return node.args[0] if node.args else node.func
    return None


def _changed(node, package):
    """(object, attribute if known, where) of what one node changes."""
    for target in targets_of(node):
        if isinstance(target, ast.Attribute):
            yield target.value, target.attr, target
        elif isinstance(target, ast.Subscript) and (owner := namespace_owner(target.value)) is not None:
            yield owner, package.text_of(target.slice), target
    if not isinstance(node, ast.Call):
        return
    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
    if name in {"setattr", "delattr"}:
        yield node.args[0], package.text_of(node.args[1]), node
    elif not isinstance(node.func, ast.Attribute):
        return
    elif name in {"__setattr__", "__delattr__"} and ast.unparse(node.func.value) != "super()":
        of_class = len(node.args) > (2 if name == "__setattr__" else 1)  # object.__setattr__(x, name, value)
        yield (node.args[0] if of_class else node.func.value), None, node
    elif name in MUTATE and (owner := namespace_owner(node.func.value)) is not None:
        yield owner, package.text_of(node.args[0]) if node.args else None, node


def changes_in(tree, package):
    """Every change of a foreign object in a file, in the order of its lines."""
    return sorted(
        {
            Change(at.lineno, ast.unparse(at))
            for node in ast.walk(tree)
            for owner, name, at in _changed(node, package)
            if not package.is_own(owner, name)
        }
    )


@functools.cache
def changes_of(folder):
    """File, relative to the package's folder -> its changes."""
    trees = {path: ast.parse(path.read_bytes()) for path in sorted(folder.rglob("*.py"))}
    package = Package(list(trees.values()))
    return {path.relative_to(folder).as_posix(): changes_in(tree, package) for path, tree in trees.items()}
