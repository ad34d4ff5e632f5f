"""Names of modules, parameters and experts: taken apart and put together.

Where a parameter NAME holds the weights of all experts, conversion makes it the module NAME_experts; the name of that
layer is NAME. No other file knows this.
"""

import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_qlora.checks import DAMAGED, shown
from lightning_qlora.layers.kinds import is_linear
from lightning_qlora.layers.packed_layer import PackedLayer
from lightning_qlora.lightning_copies import classes
from lightning_qlora.texts import join as join
from lightning_qlora.texts import printable

COMPILED = "_orig_mod"  # the name torch.compile gives a module inside its wrapper
CHECKPOINTED = "_checkpoint_wrapped_module"  # the same of torch's checkpoint_wrapper, which state dicts do not have
_EXPERTS = "_experts"
# PEFT's names, below an embedding, of the module with its rows that train and of their values.
TOKEN_ADAPTER = "token_adapter"
DELTA = f"{TOKEN_ADAPTER}.trainable_tokens_delta"
MOST_LETTERS = 4096  # of a key in a file of others: what is done with names takes the square of their length


def check_keys(keys: Iterable[Any]) -> None:
    """Raise ValueError for a key in a file that is no name of a tensor in a module."""
    for key in keys:
        if not isinstance(key, str) or len(key) > MOST_LETTERS:
            raise ValueError(f"key {shown(key)}: must be a text of at most {MOST_LETTERS} characters. {DAMAGED}")


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
    return name.rpartition(".")[2]


def name_endings(name: str) -> Iterator[str]:
    """A name, the same without its first part, without its first two, and so on."""
    while name:
        yield name
        name = name.partition(".")[2]


def without_wrappers(name: str, wrappers: Collection[str] = (COMPILED, CHECKPOINTED)) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)


def without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def stack_name(parameter: str) -> str:
    """The name of the module that a parameter with all experts becomes; the layer has the name of the parameter."""
    return parameter + _EXPERTS


def parameter_name(stack: str) -> str:
    return stack.removesuffix(_EXPERTS)


def stack_of(owner: nn.Module, key: str) -> Any:
    """The `QLoRAExperts` that the parameter `key` of a module became; None if it is dense."""
    stack = owner.__dict__["_modules"].get(stack_name(key))
    return stack if isinstance(stack, PackedLayer) and len(stack._shape) == 3 else None


def inside(name: str, outer: str) -> bool:
    """Whether a module's name is another's, or that of a part of it; all are parts of the root, ""."""
    return outer in ("", name) or name.startswith(outer + ".")


@contextmanager
def named(name: object) -> Iterator[None]:
    """Errors within this begin with a name: of a layer or a file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(printable(f"{name}: {error}")) from error


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a module, then its buffers, each tensor once."""
    return tensors_of(list(module.named_modules()))


def tensors_of(
    modules: Sequence[tuple[str, nn.Module]], kinds: Iterable[str] = ("_parameters", "_buffers")
) -> Iterator[tuple[str, Tensor]]:
    """The same for all modules in a module, by their names."""
    seen: set[int] = set()
    for kind in kinds:
        for name, module in modules:
            for key, tensor in getattr(module, kind).items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield join(name, key), tensor


def is_transformers_model(module: nn.Module) -> bool:
    """Whether a module is a transformers model; doesn't import transformers."""
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


class Names(NamedTuple):
    """The names of a layer, by their purpose. Adapter files have those of `Parts.base`."""

    full: str  # in the module that is converted: errors and reports have it
    # All that a pattern may match: from the root, from the child of a LightningModule, and from the transformers model
    # that holds it, which stay the same wherever the model stands; a module in several places has those of each.
    for_patterns: tuple[str, ...]
    # What the seed of its adapter is made from: the name in the model that was loaded, so that a layer gets the same
    # adapter wherever its model stands.
    for_seed: str
    others: tuple[str, ...] = ()  # its full names in other places of the module

    @property
    def in_state_dicts(self) -> str:
        return without_wrappers(self.full)


def only_child_of(module: nn.Module) -> str | None:
    """Name of the child that holds all parameters of a LightningModule; None if there is none, or only one layer."""
    if not isinstance(module, classes(LightningModule)) or module._parameters:
        return None
    holders = [name for name, child in module.named_children() if next(child.parameters(), None) is not None]
    if len(holders) != 1 or is_linear(module.get_submodule(holders[0])):
        return None
    return holders[0]
