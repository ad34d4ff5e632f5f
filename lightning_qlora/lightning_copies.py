"""Lightning's modules and classes, and their copies under other names: `pytorch_lightning` and `lightning_fabric`.

These packages contain the source code of lightning.pytorch and lightning.fabric a second time, so their classes are
different classes: a `pytorch_lightning.Trainer` is not an instance of `lightning.pytorch.Trainer`. A copy is used only
if the user's code has imported it; this package never does.
"""

import sys
from importlib import import_module
from typing import Any, TypeVar

Class = TypeVar("Class")
COPIES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def modules(name: str) -> list[Any]:
    """The module with this name, and its copy if it is loaded. Modules of optional packages only if they are loaded."""
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
    """Let a subclass of a class of `lightning` inherit from its copies too: the Trainer of a copy checks for those.

    Methods of `lightning` come first. Some methods check for classes of their own package: there the subclass calls
    the method of the right copy itself.
    """
    bases: list[type] = [kind.__bases__[0]]
    for base in bases[0].__mro__:
        if not base.__module__.startswith("lightning."):
            continue
        copies: tuple[Any, ...] = classes(base)
        for copy in copies:
            if not any(issubclass(previous, copy) for previous in bases):
                bases.append(copy)
    kind.__bases__ = tuple(bases)
