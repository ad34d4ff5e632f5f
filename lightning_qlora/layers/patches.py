"""`wrap_once`, the function that every file named patches.py wraps with.

Code and objects of other libraries are changed in files named patches.py only. One function makes one change; its
docstring has the upstream file, the reason, the supported ways that were tried, and what would remove it.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any


def wrap_once(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Replace the function or property `owner.name` by `replacement(original, *args)`; a second call does nothing."""
    held = inspect.getattr_static(owner, name)
    original: Any = held.fget if isinstance(held, property) else held
    mark = f"_qlora_{replacement.__name__}"
    if hasattr(original, mark):
        return

    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(wrapper, mark, True)
    setattr(owner, name, property(wrapper) if isinstance(held, property) else wrapper)
