"""Lightning's modules and classes in `lightning`, `pytorch_lightning` and `lightning_fabric`, if these are loaded.

The last two contain the source code of lightning.pytorch and lightning.fabric a second time, so their classes are
different classes: a `pytorch_lightning.Trainer` is not an instance of `lightning.pytorch.Trainer`.
"""

import sys
from typing import Any, TypeVar

Class = TypeVar("Class")


def modules(name: str) -> list[Any]:
    """The module with this name and its copy, those of the two that are loaded."""
    copy = name.replace("lightning.pytorch", "pytorch_lightning").replace("lightning.fabric", "lightning_fabric")
    return [sys.modules[each] for each in dict.fromkeys([name, copy]) if each in sys.modules]


def classes(kind: type[Class]) -> tuple[type[Class], ...]:
    """A class of `lightning`, and its copy; `isinstance` takes the tuple."""
    return tuple(getattr(module, kind.__qualname__) for module in modules(kind.__module__))


def inherit_from_copies(kind: type[Class]) -> type[Class]:
    """Let a subclass of a class of `lightning` inherit from its copies too: the Trainer of a copy checks for those.

    Methods of `lightning` come first. Some methods check for classes of their own package: there the subclass calls
    the method of the right copy itself. A copy may be loaded later, so this is called for each use of the class: its
    definition, its name in `lightning_qlora` (LightningCLI checks a class before it makes an object), and each object.
    """
    base: Any = kind.__bases__[0]
    kind.__bases__ = (base, *(copy for parent in base.__mro__ for copy in classes(parent)[1:]))
    return kind
