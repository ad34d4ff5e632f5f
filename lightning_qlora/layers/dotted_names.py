"""Dotted names of modules and parameters: joined, taken apart, and which of them are experts.

Where a parameter NAME holds the weights of all experts, conversion makes it the module NAME_experts, and expert i of it
is the layer NAME_experts.i. No other file knows this.
"""

import re
from collections.abc import Iterator

COMPILED = "_orig_mod"  # the name torch.compile gives a module inside its wrapper
CHECKPOINTED = "_checkpoint_wrapped_module"  # the same of torch's checkpoint_wrapper, which state dicts do not have
_EXPERTS = "_experts"
_EXPERT = re.compile(r"(.*)_experts\.(\d+)", re.DOTALL)


def join(*parts: str) -> str:
    """Parts of a name as one; empty ones, such as the name of the root, are left out."""
    return ".".join(part for part in parts if part)


def owner_name(name: str) -> str:
    """The name of the module that holds a module or parameter; empty for the root."""
    return name.rpartition(".")[0]


def last_part(name: str) -> str:
    """The name of a module or parameter in the module that holds it."""
    return name.rpartition(".")[2]


def name_endings(name: str) -> Iterator[str]:
    """A name, the same without its first part, without its first two, and so on."""
    while name:
        yield name
        name = name.partition(".")[2]


def plain_name(name: str) -> str:
    """A name without what torch.compile and checkpoint_wrapper put into it."""
    return ".".join(part for part in name.split(".") if part not in (COMPILED, CHECKPOINTED))


def key_name(name: str) -> str:
    """The name of a module or parameter in state dicts."""
    return ".".join(part for part in name.split(".") if part != CHECKPOINTED)


def stack_name(parameter: str) -> str:
    """The name of the module that a parameter with all experts becomes."""
    return parameter + _EXPERTS


def parameter_name(stack: str) -> str:
    """The reverse of `stack_name`."""
    return stack.removesuffix(_EXPERTS)


def expert_name(parameter: str, number: int) -> str:
    """The name of an expert's layer."""
    return f"{parameter}{_EXPERTS}.{number}"


def parameter_and_number(name: str) -> tuple[str, int] | None:
    """The reverse of `expert_name`; None for a layer that is no expert."""
    found = _EXPERT.fullmatch(name)
    return None if found is None else (found[1], int(found[2]))


def is_expert(name: str) -> bool:
    """Whether a layer of this name is an expert of a parameter."""
    return parameter_and_number(name) is not None
