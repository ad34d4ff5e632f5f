"""InstanceMethod: what stands in place of a method of one module, such as its `forward`; the module keeps its class.

    vars(module)["forward"] = InstanceMethod(module)        what accelerate's hooks do, as an object

It calls what it replaces: the method that the module had before (of accelerate, of torch.compile, another one of ours),
else that of its class as the class is at the time of the call. An object, and no closure: copies and pickles of a
module have one that calls the copy, and torch.compile traces it, which it does not do with forward hooks.

It never makes a bound method `module.forward`: where a graph breaks, torch.compile makes that again by
`getattr(module, "forward")`, which is this object, so the call would never end.
"""

import copy
import inspect
from collections.abc import Callable
from functools import update_wrapper
from typing import Any, TypeVar

from torch import nn

from lightning_qlora.dtypes import patches
from lightning_qlora.tensors.held_types import TYPES

METHODS = "_qlora_methods"  # attribute of a module: its instance methods, in the order in which they were added
CHANGES = {METHODS, TYPES}  # attributes of a module that computes in another way, or holds values in another type
REDUCE = "__reduce_ex__"  # what copy.copy, copy.deepcopy and pickle ask an object for


class Owner:
    """The module of instance methods; in a copy that is being made it has no module yet, see `CopyWithMethods`."""

    module: nn.Module


class InstanceMethod:
    """A method of one module; subclasses say in `call` what it does."""

    def __init_subclass__(cls) -> None:
        cls.__annotations__ = vars(InstanceMethod)["__annotations__"]  # type: ignore[method-assign]

    def __init__(self, module: nn.Module, name: str = "forward") -> None:
        self.owner = owner_of(module)
        self.name = name
        self.before: Callable[..., Any] | None = vars(module).get(name)
        self.is_removed = False  # what other code put around it still calls it then

    @property
    def module(self) -> nn.Module:
        return self.owner.module

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        module = self.module
        return getattr(type(module), self.name)(module, *args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def add_to_report(self, report: Any, name: str) -> None:
        """Add to the report of a conversion what this does to the module of this name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_removed:
            return self.original(*args, **kwargs)
        return self.call(*args, **kwargs)

    @property
    def __self__(self) -> nn.Module:
        return self.module

    @property
    def __func__(self) -> Callable[..., Any]:
        """A function of a module, which other code binds to it or to a copy of it, as accelerate does."""

        def function(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            method = self if module is self.module else instance_method(module, type(self), self.name)
            if method is None:
                return getattr(type(module), self.name)(module, *args, **kwargs)
            return method(*args, **kwargs)

        update_wrapper(function, self.replaced)
        del function.__wrapped__  # type: ignore[attr-defined]  # who unwraps the function would lose this method
        signature = inspect.signature(self.replaced)
        module = inspect.Parameter("module", inspect.Parameter.POSITIONAL_ONLY)
        parameters = [module, *signature.parameters.values()]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    @property
    def replaced(self) -> Callable[..., Any]:
        """The method of other code or of the class below all of ours."""
        before = self.before
        while isinstance(before, InstanceMethod):
            before = before.before
        if before is not None:
            return before
        method: Callable[..., Any] = getattr(type(self.module), self.name).__get__(self.module)
        return method

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What `inspect.signature` and Lightning look at."""
        return self.replaced

    @property
    def __annotations__(self) -> Any:  # type: ignore[override]
        """What `typing.get_type_hints` reads."""
        return self.replaced.__annotations__

    @property
    def __code__(self) -> Any:
        """What torch.export reads."""
        return self.replaced.__code__


class OfTraining(InstanceMethod):
    """A method that stands there until the module is merged."""


class CopyWithMethods:
    """`__reduce_ex__` of a module with instance methods: those of a copy belong to the copy, of `copy.copy` too."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner

    def __call__(self, protocol: Any) -> Any:
        module, owner = self.owner.module, Owner()
        reduced: Any = type(module).__reduce_ex__(module, protocol)
        function, args, *rest = reduced
        if not rest or not isinstance(rest[0], dict):  # torch.fx's GraphModule, __slots__: as the class does it
            return reduced
        state, *rest = rest
        state = {**state, REDUCE: CopyWithMethods(owner)}
        made: dict[int, Any] = {}
        for method in state.get(METHODS, ()):
            made[id(method)] = new = copy.copy(method)
            new.owner = owner
            new.before = made.get(id(method.before), method.before)
        state[METHODS] = list(made.values())
        for method in made.values():
            state[method.name] = made.get(id(state.get(method.name)), state.get(method.name))
        return (_made, (owner, function, *args), state, *rest)


def _made(owner: Owner, function: Callable[..., nn.Module], *args: Any) -> nn.Module:
    owner.module = function(*args)
    return owner.module


def owner_of(module: nn.Module) -> Owner:
    reduce = vars(module).get(REDUCE)
    if isinstance(reduce, CopyWithMethods):
        return reduce.owner
    owner = Owner()
    owner.module = module
    patches.replace_method(module, REDUCE, CopyWithMethods(owner))
    return owner


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
    """Give a module back what its instance methods of a class, and of its subclasses, replaced."""
    methods: list[InstanceMethod] = vars(module).pop(METHODS, [])
    for method in methods:
        if not isinstance(method, kind):
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
    elif isinstance(vars(module).get(REDUCE), CopyWithMethods):
        patches.replace_method(module, REDUCE, None)


def has_other_forward(module: nn.Module) -> bool:
    """Whether other code replaced the `forward` of a module, as accelerate does to move its parameters."""
    method = vars(module).get("forward")
    while isinstance(method, InstanceMethod):
        method = method.before
    return method is not None
