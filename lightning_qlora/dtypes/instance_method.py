"""InstanceMethod: what stands in place of a method of one module, such as its `forward`; the module keeps its class.

    vars(module)["forward"] = InstanceMethod(module)        what accelerate's hooks do, as an object

It calls what it replaces: the method that the module had before (of accelerate, of torch.compile, another one of ours),
else that of its class as the class is at the time of the call. An object, and no closure: copies and pickles of a
module have one that calls the copy, and torch.compile traces it, which it does not do with forward hooks.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from lightning_qlora.dtypes import patches

METHODS = "_qlora_methods"  # attribute of a module: its instance methods, in the order in which they were added


class InstanceMethod:
    """A method of one module; subclasses say in `call` what it does."""

    def __init__(self, module: nn.Module, name: str = "forward") -> None:
        self.module = module
        self.name = name
        self.before: Callable[..., Any] | None = vars(module).get(name)
        self.is_removed = False  # what other code put around it still calls it then

    @property
    def original(self) -> Callable[..., Any]:
        if self.before is not None:
            return self.before
        method: Callable[..., Any] = getattr(type(self.module), self.name).__get__(self.module)
        return method

    def call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_removed:
            return self.original(*args, **kwargs)
        return self.call(self.original, *args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What `inspect.signature` and Lightning look at."""
        original = self.original
        while isinstance(original, InstanceMethod):
            original = original.original
        return original

    @property
    def __code__(self) -> Any:
        """What torch.export reads."""
        return self.__wrapped__.__code__


Method = TypeVar("Method", bound=InstanceMethod)


def instance_method(module: nn.Module, kind: type[Method], name: str = "forward") -> Method | None:
    for method in vars(module).get(METHODS, ()):
        if type(method) is kind and method.name == name:
            return method
    return None


def add(method: InstanceMethod) -> None:
    patches.replace_method(method.module, method.name, method)
    vars(method.module)[METHODS] = [*vars(method.module).get(METHODS, ()), method]


def remove(module: nn.Module, kind: type[InstanceMethod]) -> None:
    """Give a module back what its instance methods of a class replaced."""
    methods: list[InstanceMethod] = vars(module).pop(METHODS, [])
    for method in methods:
        if type(method) is not kind:
            continue
        method.is_removed = True
        if vars(module).get(method.name) is method:
            patches.replace_method(module, method.name, method.before)
        for outer in methods:
            if outer.before is method:
                outer.before = method.before
    left = [method for method in methods if not method.is_removed]
    if left:
        vars(module)[METHODS] = left


def has_other_forward(module: nn.Module) -> bool:
    """Whether other code replaced the `forward` of a module, as accelerate does to move its parameters."""
    method = vars(module).get("forward")
    while isinstance(method, InstanceMethod):
        method = method.before
    return method is not None
