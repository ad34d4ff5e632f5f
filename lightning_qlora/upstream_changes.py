"""`replaces` and `make_changes`, by which files named patches.py change functions of other libraries.

Code and objects of other libraries are changed in these files only. One function makes one change; its docstring has
the upstream file, the reason, the supported ways that were tried, and what would remove it.
"""

import inspect
import sys
from collections.abc import Callable
from functools import reduce, wraps
from typing import Any, TypeVar

from lightning_qlora.lightning_copies import modules
from lightning_qlora.upstream_names import check_names

Function = TypeVar("Function", bound=Callable[..., Any])
CHANGES: list[Any] = []  # module, name of a function in it, and what takes its place


def wrap_once(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Replace the function `owner.name` by `replacement(original, *args)`; a second call does nothing.

    A static method stays one, as it may be called on an object, and a class method too: its class is the first of args.
    """
    descriptor = inspect.getattr_static(owner, name)
    original = getattr(descriptor, "__func__", descriptor)
    mark = f"_qlora_{replacement.__name__}"
    if hasattr(original, mark):
        return

    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(wrapper, mark, True)
    is_function = descriptor is original
    setattr(owner, name, wrapper if is_function else type(descriptor)(wrapper))


def replaces(*places: str) -> Callable[[Function], Function]:
    """Decorate what takes the place of functions of other packages; it gets the original one first.

    A place is "module:function" or "module:Class.method". `make_changes` puts the change there.
    """

    def register(replacement: Function) -> Function:
        CHANGES.extend((*place.split(":"), replacement) for place in places)
        return replacement

    return register


def make_changes(*packages: str) -> None:
    """Make the changes to these packages, once: to lightning also in its copies, to transformers if loaded.

    Raises:
        ImportError: If the installed version of a package lacks a name that this package uses.
    """
    for package in packages:
        if package in sys.modules:
            check_names(package)
    for module, name, replacement in CHANGES:
        *owners, last = name.split(".")
        if module.partition(".")[0] in packages:
            for each in modules(module):
                wrap_once(reduce(getattr, owners, each), last, replacement)
