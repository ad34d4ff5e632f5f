"""Classes that conversion derives from those of the user's layers, and how their instances are copied and pickled."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any


class Derived:
    """An instance of a class that a function decorated with `derives` made: no name of it could be imported."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        recipe = vars(type(self)).get("_qlora_recipe")
        return made if recipe is None else (_new, (recipe,), *made[2:])


def derives(make: Callable[[Any], type[Any]]) -> Callable[[Any], type[Any]]:
    """Decorator of a function that makes a class from a class: each once, with a note of how it was made."""

    @cache
    @wraps(make)
    def function(dense_class: Any) -> type[Any]:
        made = make(dense_class)
        made._qlora_recipe = function, vars(dense_class).get("_qlora_recipe", dense_class)
        return made

    return function


def _made(recipe: Any) -> type[Any]:
    """The class of a recipe: a class, or a function and the recipe of the class that it makes another from."""
    return recipe[0](_made(recipe[1])) if isinstance(recipe, tuple) else recipe  # type: ignore[no-any-return]


def _new(recipe: Any) -> Any:
    """An instance without attributes."""
    return object.__new__(_made(recipe))
