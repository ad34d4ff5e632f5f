"""Lightning's modules and classes, and their copies under other names: `pytorch_lightning` and `lightning_fabric`.

These packages contain the same source as lightning.pytorch and lightning.fabric. Their classes are other objects, so
`isinstance` with the class of one package is False for an object of the other. A copy is used only if the user imported
it.
"""

import sys
from importlib import import_module
from typing import Any, TypeVar

Class = TypeVar("Class")
COPIES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def modules(name: str) -> list[Any]:
    """The module of `lightning` with this name and its copy; the module of an optional package only if it is loaded."""
    package = ".".join(name.split(".")[:2])
    if package not in COPIES:
        if name.startswith("torch.") or name in sys.modules:
            return [import_module(name)]
        return []
    module = import_module(name)
    copy = sys.modules.get(COPIES[package] + name.removeprefix(package))
    version: str = getattr(sys.modules.get(COPIES[package]), "__version__", "0")
    if copy is None or [int(number) for number in version.split(".")[:2]] < [2, 5]:  # older ones lack some modules
        return [module]
    return [module, copy]


def classes(kind: type[Class]) -> tuple[type[Class], ...]:
    """A class of `lightning`, and its copy; `isinstance` takes the tuple."""
    return tuple(getattr(module, kind.__qualname__) for module in modules(kind.__module__))


def inherit_from_copies(kind: type) -> None:
    """Add the copies to the bases of a class that inherits from one of `lightning`: their Trainer checks for them.

    The methods of `lightning` come first. Where a method of the copy checks for classes of its package, the class has
    to call the right one.
    """
    bases: list[type] = [kind.__bases__[0]]
    for base in bases[0].__mro__:
        if not base.__module__.startswith("lightning."):
            continue
        for copy in classes(base):
            if not any(issubclass(previous, copy) for previous in bases):
                bases.append(copy)
    kind.__bases__ = tuple(bases)
