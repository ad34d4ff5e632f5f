"""InstanceMethod: what stands in place of a method of one module, such as its `forward`; the module keeps its class.

    vars(module)["forward"] = InstanceMethod(module)        what accelerate's hooks do, as an object

It calls what it replaces: the method that the module had before (of accelerate, of torch.compile, another one of ours),
else that of its class as the class is at the time of the call. An object, and no closure: `copy.deepcopy` and pickle
make one that calls the copy, and torch.compile traces it, which it does not do with hooks that enter a context.

It never makes a bound method `module.forward`: where a graph breaks, torch.compile makes that again by
`getattr(module, "forward")`, which is this object, so the call would never end.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

METHODS = "_qlora_methods"  # attribute of a module: its instance methods, in the order in which they were added


class InstanceMethod:
    """A method of one module; subclasses say in `call` what it does."""

    def __init_subclass__(cls) -> None:
        cls.__annotations__ = vars(InstanceMethod)["__annotations__"]  # type: ignore[method-assign]

    def __init__(self, module: nn.Module, name: str = "forward") -> None:
        self.module = module
        self.name = name
        self.before: Callable[..., Any] | None = vars(module).get(name)
        self.is_removed = False  # what other code put around it still calls it then

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def add_to_report(self, report: Any, name: str) -> None:
        """Add to the report of a conversion what this does to the module of this name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_removed:
            return self.original(*args, **kwargs)
        return self.call(*args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method of other code or of the class below all of ours: `inspect.signature` and Lightning look at it."""
        before = self.before
        while isinstance(before, InstanceMethod):
            before = before.before
        if before is not None:
            return before
        method: Callable[..., Any] = getattr(type(self.module), self.name).__get__(self.module)
        return method

    @property
    def __annotations__(self) -> Any:  # type: ignore[override]
        """What `typing.get_type_hints` reads."""
        return self.__wrapped__.__annotations__

    @property
    def __code__(self) -> Any:
        """What torch.export reads."""
        return self.__wrapped__.__code__


class OfTraining(InstanceMethod):
    """A method that stands there until the module is merged."""


Method = TypeVar("Method", bound=InstanceMethod)


def instance_method(module: nn.Module, kind: type[Method], name: str = "forward") -> Method | None:
    for method in vars(module).get(METHODS, ()):
        if type(method) is kind and method.name == name:
            return method
    return None


def add(method: InstanceMethod) -> None:
    attributes = vars(method.module)
    attributes[method.name] = method
    attributes[METHODS] = [*attributes.get(METHODS, ()), method]


def remove(module: nn.Module, kind: type[InstanceMethod]) -> None:
    """Give a module back what its instance methods of a class, and of its subclasses, replaced."""
    attributes = vars(module)
    methods: list[InstanceMethod] = attributes.pop(METHODS, [])
    for method in methods:
        if not isinstance(method, kind):
            continue
        method.is_removed = True
        if attributes.get(method.name) is method:
            if method.before is None:
                del attributes[method.name]
            else:
                attributes[method.name] = method.before
        for outer in methods:
            if outer.before is method:
                outer.before = method.before
    left = [method for method in methods if not method.is_removed]
    if left:
        attributes[METHODS] = left


def check_in_place(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise RuntimeError if other code took an instance method away, as `kernels` does at `train()` and `eval()`."""
    for name, part in modules:
        for method in vars(part).get(METHODS, ()):
            if method.name not in vars(part):
                raise RuntimeError(
                    f"{name or 'the module'}: other code removed the {method.name} that convert gave this "
                    f"{type(part).__name__} ({type(method).__name__}). Kernels of the hub do so: pass "
                    "use_kernels=False to from_pretrained. Otherwise call convert again after that code."
                )


def has_other_forward(module: nn.Module) -> bool:
    """Whether other code replaced the `forward` of a module, as accelerate does to move its parameters."""
    method = vars(module).get("forward")
    while isinstance(method, InstanceMethod):
        method = method.before
    return method is not None
