"""Values that are held in another type in a module of 16 bits, and their types before.

    vars(part)["_qlora_types"]      key of a parameter or buffer -> the 16-bit type that it had
    state dicts                     have the values as they are
    files, merged modules           have the types before (`in_types_before`, `release`)

What trains in full is held in fp32 on every device, a whole module in fp32 on devices that are slow in 16 bits, and one
of fp16 in bf16 on a GPU (`full_precision.py`).
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.tensors.device_types import IN_16_BITS
from lightning_qlora.tensors.dtensor import is_sharded
from lightning_qlora.tensors.values import can_be_read
from lightning_qlora.texts import join

Casts = dict[Any, tuple[Tensor, Tensor]]  # memory of a tensor -> the tensor, and its cast
HELD = {(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.float16)}  # in, before
TYPES = "_qlora_types"  # attribute of a module: key -> type before, of each tensor of its own that is held in another
OTHER_TYPES = re.compile("same dtype|expected scalar type|type .* should be the same")  # in the text of an error
KEPT_IN_FP32 = (
    "{} trains in full, so it is kept in fp32 and computes in 16 bits under autocast: in any forward and in the steps. "
    "Elsewhere (other hooks, callbacks, code after a run) call the module and not F.linear with its weight, cast the "
    "weight (weight.to(x.dtype)), or use torch.autocast."
)


def own_tensors(part: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a module holds itself, by key."""
    return dict([*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)])


def held_in(part: nn.Module) -> list[tuple[str, Tensor, torch.dtype]]:
    """Key, value and type before of what a module holds in another type; what a cast gave one is not held."""
    types: dict[str, torch.dtype] | None = vars(part).get(TYPES)
    if types is None:
        return []
    tensors = own_tensors(part)
    held = [(key, tensors[key], dtype) for key, dtype in types.items() if key in tensors]
    return [entry for entry in held if (entry[1].dtype, entry[2]) in HELD]


def types_before(part: nn.Module) -> dict[str, torch.dtype]:
    return {key: dtype for key, _, dtype in held_in(part)}


def set_types_before(part: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Replace the types before; those that are no 16-bit types are left out."""
    types = {key: dtype for key, dtype in types.items() if dtype in IN_16_BITS}
    if types:
        vars(part)[TYPES] = types
    else:
        vars(part).pop(TYPES, None)


def held_tensors(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Name, value and type before of each parameter and buffer that is held; tied ones with the first name."""
    seen = set[int]()
    for name, part in modules:
        for key, tensor, dtype in held_in(part):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield join(name, key), tensor, dtype


def full_precision_parameters(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """The same of what trains in fp32."""
    held = held_tensors(modules)
    return (entry for entry in held if entry[1].requires_grad and entry[1].dtype is torch.float32)


def advice_on_types(error: BaseException, module: nn.Module) -> str | None:
    """What to do about an error of code that uses such a parameter outside of what runs under autocast."""
    name = next((name for name, *_ in full_precision_parameters([*module.named_modules()])), None)
    return KEPT_IN_FP32.format(name) if name and OTHER_TYPES.search(str(error)) else None


def held_bytes(modules: Iterable[tuple[str, nn.Module]]) -> int:
    """How many bytes more a module takes, because of the types that what does not train is held in; once if shared."""
    held = [(tensor, dtype) for _, tensor, dtype in held_tensors(modules) if not tensor.requires_grad]
    return sum(tensor.numel() * (tensor.itemsize - dtype.itemsize) for tensor, dtype in held)


def cast_in_place(tensor: Tensor, dtype: torch.dtype, casts: Casts | None = None) -> None:
    """Cast a parameter or buffer, and its gradient if there is one, in place: it stays the same object.

    `casts`: the values that were cast before, by their memory, which gets this one.
    """
    grad = tensor.grad
    tensor.grad = None
    tensor.data = _cast(tensor.data, dtype, {} if casts is None else casts)
    if grad is not None:
        tensor.grad = grad.to(dtype)


def _cast(value: Tensor, dtype: torch.dtype, casts: Casts) -> Tensor:
    if not can_be_read(value):
        return value.to(dtype)
    memory = value.device, value.data_ptr(), value.shape, value.stride()
    _, result = casts.setdefault(memory, (value, value.to(dtype)))  # with `value`, so that its memory is not reused
    return result.view_as(result)


def in_types_before(module: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict for a file: what is held and does not train in its type before, if that holds it exactly.

    It keeps torch's `_metadata`: by the versions in it modules tell entries of an earlier code, and change them.
    """
    narrow = {}
    for name, part in module.named_modules(remove_duplicate=False):
        for key, tensor, dtype in held_in(part):
            value = state_dict.get(join(name, key))
            if value is not None and not is_sharded(value) and not tensor.requires_grad:
                narrow[join(name, key)] = value.to(dtype)
    exact = {key: value for key, value in narrow.items() if torch.equal(value.float(), state_dict[key].float())}
    if exact:
        state_dict = copy.copy(state_dict)
        state_dict.update(exact)
    return state_dict
