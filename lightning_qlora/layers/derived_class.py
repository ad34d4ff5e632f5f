"""Classes that conversion derives from those of the user's layers, and how their instances are copied and pickled."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

# Class that a function decorated with `derives` made -> that function, and the recipe of the class it was made from.
RECIPES: dict[type, tuple[Any, Any]] = {}


class Derived:
    """An instance of a class that a function decorated with `derives` made: no name of it could be imported."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        recipe = RECIPES.get(type(self))
        return made if recipe is None else (_new, (recipe,), *made[2:])


def derives(make: Callable[[Any], type[Any]]) -> Callable[[Any], type[Any]]:
    """Decorator of a function that makes a class from a class: each once, and noted in RECIPES."""

    @cache
    @wraps(make)
    def function(dense_class: Any) -> type[Any]:
        derived = make(dense_class)
        RECIPES[derived] = function, RECIPES.get(dense_class, dense_class)
        return derived

    return function


def _made(recipe: Any) -> type[Any]:
    """The class of a recipe: a class, or a function and the recipe of the class that it makes another from."""
    return recipe[0](_made(recipe[1])) if isinstance(recipe, tuple) else recipe  # type: ignore[no-any-return]


def _new(recipe: Any) -> Any:
    """An instance without attributes."""
    return object.__new__(_made(recipe))
