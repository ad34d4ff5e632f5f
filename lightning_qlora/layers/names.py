"""Names of modules, parameters and experts: taken apart, put together, and matched by patterns.

A layer has two names. `full_name` is its name in the module that was converted; errors and reports have it. `seed_name`
is what the seed of its adapter is made from: its name in the model that was loaded, so that a layer gets the same
adapter wherever its model stands. Adapter files have the names of the base model (`base_layers`).

Where a parameter NAME holds the weights of all experts, conversion makes it the module NAME_experts; the name of that
layer is NAME. No other file knows this.
"""

import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_qlora.layers.kinds import is_linear
from lightning_qlora.layers.packed_linear import PackedLayer
from lightning_qlora.lightning_copies import classes

COMPILED = "_orig_mod"  # the name torch.compile gives a module inside its wrapper
CHECKPOINTED = "_checkpoint_wrapped_module"  # the same of torch's checkpoint_wrapper, which state dicts do not have
_EXPERTS = "_experts"


def join(*parts: str) -> str:
    """Parts of a name as one; empty ones, such as the name of the root, are left out."""
    return ".".join(part for part in parts if part)


def owner_name(name: str) -> str:
    """The name of the module that holds a module or parameter; empty for the root."""
    return name.rpartition(".")[0]


def outer_names(name: str) -> Iterator[str]:
    """A name, that of the module that holds it, and so on to the root."""
    while name:
        yield name
        name = owner_name(name)
    yield ""


def last_part(name: str) -> str:
    """The name of a module or parameter in the module that holds it."""
    return name.rpartition(".")[2]


def name_endings(name: str) -> Iterator[str]:
    """A name, the same without its first part, without its first two, and so on."""
    while name:
        yield name
        name = name.partition(".")[2]


def without_wrappers(name: str, wrappers: Collection[str] = (COMPILED, CHECKPOINTED)) -> str:
    """A name without what torch.compile and checkpoint_wrapper put into it."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def without_numbers(name: str) -> str:
    """A name with * for every number."""
    return re.sub(r"\d+", "*", name)


def stack_name(parameter: str) -> str:
    """The name of the module that a parameter with all experts becomes; the layer has the name of the parameter."""
    return parameter + _EXPERTS


def parameter_name(stack: str) -> str:
    """The reverse of `stack_name`."""
    return stack.removesuffix(_EXPERTS)


def stack_of(owner: nn.Module, key: str) -> Any:
    """The `QLoRAExperts` that the parameter `key` of a module became; None if it is dense."""
    stack = owner.__dict__["_modules"].get(stack_name(key))
    return stack if isinstance(stack, PackedLayer) and stack.is_stack else None


def matches(name: str, patterns: str | list[str]) -> bool:
    """Whether a module's name matches, as in PEFT: a regular expression for all of it, or a list of name endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in patterns)


def matches_outer(name: str, patterns: str | list[str]) -> bool:
    """Whether the name of a module, or of a module that it is inside of, matches."""
    parts = name.split(".")
    return any(matches(".".join(parts[:end]), patterns) for end in range(1, len(parts) + 1))


def inside(name: str, outer: str) -> bool:
    """Whether a module's name is another's, or that of a part of it; all are parts of the root, ""."""
    return outer in ("", name) or name.startswith(outer + ".")


@contextmanager
def named(name: object) -> Iterator[None]:
    """Errors within this begin with a name: of a layer or a file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a module, then its buffers."""
    return chain(module.named_parameters(), module.named_buffers())


def is_transformers_model(module: nn.Module) -> bool:
    """Whether a module is a transformers model; doesn't import transformers."""
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


class LayerNames(NamedTuple):
    """Names of one module; one that is used in several places has several of each kind."""

    # Every name that a pattern may match: from the root, from the child of a LightningModule, and from the transformers
    # model that holds the module.
    all: list[str]
    seed_name: str

    def match(self, patterns: str | list[str] | None) -> bool:
        """Whether one of the names matches."""
        return any(matches(name, patterns or []) for name in self.all)

    def match_outer(self, patterns: str | list[str] | None) -> bool:
        """Whether one of the names, or the name of a module around it, matches."""
        return any(matches_outer(name, patterns or []) for name in self.all)


def names_of_modules(root: nn.Module) -> dict[int, LayerNames]:
    """Id of each module in `root` -> its names.

    A transformers model has the same names in it before and after it becomes a part of a LightningModule, so a layer
    gets the same adapter whether it is converted while its model loads or later.
    """
    names: dict[int, LayerNames] = {}
    is_lightning = isinstance(root, classes(LightningModule))
    only_child = only_child_of(root)
    model: str | None = None
    for name, part in root.named_modules(remove_duplicate=False):  # a module comes before those inside it
        if model is None or not inside(name, model):
            model = name if is_transformers_model(part) else None
        in_child = ""
        if is_lightning:
            in_child = name.partition(".")[2]
        in_model = ""
        if model is not None:
            in_model = name[len(model) :].lstrip(".")
        if isinstance(part, PackedLayer):
            # From the model that was loaded, which may be a part of another one now.
            seed_name = vars(part)["seed_name"]
        else:
            seed_name = without_wrappers(in_model or (only_child and in_child) or name)
        names_of_part = names.setdefault(id(part), LayerNames([], seed_name))
        full = [each for each in (name, in_child, in_model, seed_name) if each or not name]
        names_of_part.all.extend(dict.fromkeys([*full, *map(without_wrappers, full)]))
    return names


def only_child_of(module: nn.Module) -> str | None:
    """Name of the child that holds all parameters of a LightningModule; None if there is none, or only one layer."""
    if not isinstance(module, classes(LightningModule)) or module._parameters:
        return None
    holders = [name for name, child in module.named_children() if next(child.parameters(), None) is not None]
    if len(holders) != 1 or is_linear(module.get_submodule(holders[0])):
        return None
    return holders[0]
