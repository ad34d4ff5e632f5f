"""Classes that conversion derives from those of the user: how a module gets one, and its own class back.

    derive(QLoRALinear, layer)      class of the layer -> its subclass with QLoRALinear, made once for each class
    restore(layer, QLoRALinear)     the class without it, with what was derived after it

Hooks, aliases and `isinstance` stay valid, because the module stays the same object. No import finds a derived class,
so a copy or pickle of a module says from which class it was derived, and by what.
"""

from functools import cache
from typing import Any, ClassVar


class Derived:
    """What a mixin inherits from; each gives a module one behaviour."""

    is_decided: ClassVar[bool] = False  # whether a later conversion leaves such a part as it is
    classes_before: ClassVar[dict[type, type[Any]]] = {}  # mixin -> the class without it, in the order of `derive`

    def __init_subclass__(cls, **_: Any) -> None:
        """Not that of the user's class, which may keep a registry of its classes, or need an argument."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError(
            f"{type(self).__name__}(...): is no class to call. lightning_qlora.convert(module) makes such parts of "
            "those that a module has; for a new one call the class that they had before, such as torch.nn.Linear."
        )

    def frozen_values(self, parameter: Any) -> Any:
        """What of a parameter conversion froze."""
        return parameter

    def complete_dense_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Add what the state of a dense module lacks of this part."""

    def split_over(self, mesh: Any, by_inputs: bool) -> None:
        """Let each rank of a mesh keep its part, by inputs or by outputs: tensor parallelism."""
        raise NotImplementedError

    @classmethod
    def _derived_bases(cls, before: type[Any]) -> tuple[type, ...]:
        return cls, before

    @classmethod
    def _derived_members(cls, before: type[Any]) -> dict[str, Any]:
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if "classes_before" not in vars(type(self)):  # a library derived a class from this one
            return reduced
        original, mixins = original_class(type(self)), tuple(self.classes_before)
        return _new, (original, mixins), *reduced[2:]


def derive(mixin: Any, instance: Any, before: Any = None) -> Any:
    """Add a mixin to the class of a module, in place. `before`: the class to derive from; None: that of the module."""
    if not isinstance(instance, mixin):
        kind: Any = type(instance)
        if before is not None:
            kind = before
        instance.__class__ = _derived_class(mixin, kind)
    return instance


def restore(instance: Any, mixin: Any) -> None:
    mixins = list(instance.classes_before)
    number = mixins.index(mixin)
    instance.__class__ = _class_of(instance.classes_before[mixin], mixins[number + 1 :])


def original_class(kind: type[Any]) -> type[Any]:
    classes_before: dict[type, type] = getattr(kind, "classes_before", {})
    return next(iter(classes_before.values()), kind)


@cache
def _derived_class(mixin: Any, before: Any) -> Any:
    bases = mixin._derived_bases(before)
    classes_before = {**getattr(before, "classes_before", {}), mixin: before}
    own: type[Derived] = bases[0]
    if before in own.__bases__:  # QLoRALinear, for nn.Linear
        own.classes_before = classes_before
        return own
    members = {"__module__": before.__module__, "classes_before": classes_before, **mixin._derived_members(before)}
    return type(members.pop("__name__", f"QLoRA{before.__name__}"), bases, members)


def _class_of(kind: Any, mixins: Any) -> Any:
    for mixin in mixins:
        kind = _derived_class(mixin, kind)
    return kind


def _new(original: Any, mixins: Any) -> Any:
    return object.__new__(_class_of(original, mixins))
