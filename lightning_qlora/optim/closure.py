"""The closure of `Optimizer.step(closure)`, which has the backward pass: what runs between it and the update."""

from collections.abc import Callable
from typing import Any


def after_closure(closure: Callable[[], Any], action: Callable[[], Any]) -> Callable[[], Any]:

    def run() -> Any:
        loss = closure()
        action()
        return loss

    return run


def before_update(args: Any, kwargs: dict[str, Any], action: Callable[[], Any]) -> Any:
    """Do something in a step pre-hook, which runs before the closure: now, or after the closure if there is one.

    `args` begin with the optimizer. Returns what the hook returns: the arguments of the step.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        action()
        return None
    closure = after_closure(closure, action)
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}
