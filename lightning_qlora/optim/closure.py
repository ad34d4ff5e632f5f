"""The closure of `Optimizer.step(closure)`, which has the backward pass: what runs between it and the update."""

from collections.abc import Callable
from typing import Any


def closure_of(args: Any, kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """The closure among the arguments of a step, as a step pre-hook of torch gets them; args[0] is the optimizer."""
    return args[1] if len(args) > 1 else kwargs.get("closure")


def after_closure(closure: Callable[[], Any], action: Callable[[], Any]) -> Callable[[], Any]:

    def run() -> Any:
        loss = closure()
        action()
        return loss

    return run


def before_update(args: Any, kwargs: dict[str, Any], action: Callable[[], Any]) -> Any:
    """Do something in a step pre-hook, which runs before the closure: now, or after the closure if there is one.

    Returns what the hook returns: the arguments of the step.
    """
    closure = closure_of(args, kwargs)
    if closure is None:
        action()
        return None
    closure = after_closure(closure, action)
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}
