"""Copies of layers that were made before conversion: averages of weights (EMA, SWA), teachers, references.

After conversion a module trains adapters, and code that pairs the parameters of both averages others than before. Parts
of a module are converted alike. What attributes hold beside its parts (the shadow of torch_ema, a list) can't follow.
"""

from collections.abc import Container, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_qlora.layers.names import join, name_endings, owner_name, tensors_of, without_numbers
from lightning_qlora.selection.selection import Selection
from lightning_qlora.survey.parts import Parts
from lightning_qlora.tensors.values import can_be_read

SAMPLES = 16  # elements of a weight that are compared first
OWN = vars(LightningModule()).keys()  # attributes that are not the user's


class Copy(NamedTuple):
    name: str
    original: str
    is_parameter: bool
    is_part: bool = True  # of the module; else it is in an attribute of this name

    @property
    def modules(self) -> tuple[str, str]:
        """Names of the modules that are equal: those of the tensors without the end that both have."""
        owners = owner_name(self.name), owner_name(self.original)
        if not self.is_parameter:
            return owners
        ending = _common_ending(self.name, self.original)
        name, original = (each.removesuffix(ending).rstrip(".") for each in (self.name, self.original))
        return name or owners[0], original or owners[1]  # beside the copy, a module has the layers of its original


def find_copies(parts: Parts, choice: Selection) -> list[Copy]:
    """The tensors of a module that are equal, where one of them is the weight of a layer to convert.

    Constants are not compared (layers that begin with zeros), nor layers whose names differ in a number alone
    (`nn.TransformerEncoder` makes its layers as copies of one).
    """
    matrices = [(name, each) for name, each in tensors_of(parts.named) if is_comparable(each) and each.ndim >= 2]
    held = [(name, each) for name, each in _held(parts) if is_comparable(each) and each.ndim >= 2]
    of_shape: dict[torch.Size, set[str]] = {}
    for name, tensor in matrices + held:
        of_shape.setdefault(tensor.shape, set()).add(without_numbers(name))
    targets = {row.weight_name for row in choice.convert.values()}
    groups: dict[object, list[tuple[str, Tensor]]] = {}
    for name, tensor in matrices:
        key = sample(tensor) if len(of_shape[tensor.shape]) > 1 else None
        if key is not None:
            groups.setdefault((tensor.shape, *key), []).append((name, tensor))
    copies = []
    for equal in groups.values():
        for place, (name, tensor) in enumerate(equal):
            earlier = [each for each in equal[:place] if without_numbers(each[0]) != without_numbers(name)]
            if not earlier:
                continue
            original, values = max(earlier, key=lambda each: len(_common_ending(name, each[0])))
            if not {name, original} & targets or tensor.data_ptr() == values.data_ptr():
                continue
            if bool((tensor == values.to(tensor.device)).all()):
                copies.append(Copy(name, original, isinstance(tensor, nn.Parameter)))
    for name, tensor in held:
        originals = (each for each, _ in groups.get((tensor.shape, *(sample(tensor) or ())), ()) if each in targets)
        copies += [Copy(name, original, False, is_part=False) for original in [*originals][:1]]
    return copies


def _held(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    """Each tensor that an attribute holds beside the parts of the module, by the name of the attribute."""
    known = {*map(id, parts.modules)}
    for name, part in parts.named:
        for key in vars(part).keys() - OWN:
            for tensor in _tensors_in(vars(part)[key], known):
                yield join(name, key), tensor


def _tensors_in(value: Any, known: Container[int], depth: int = 2) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        if id(value) not in known:
            yield from chain(value.parameters(), value.buffers())
    elif depth:
        inner = getattr(value, "__dict__", {}).values()
        if isinstance(value, (list, tuple, dict)):
            inner = value.values() if isinstance(value, dict) else value
        for each in [*inner]:
            yield from _tensors_in(each, known, depth - 1)


def share_seeds(choice: Selection, copies: list[Copy]) -> None:
    names = {row.weight_name: name for name, row in choice.convert.items()}
    for copy in copies:
        if copy.name in names and copy.original in names:
            name = names[copy.name]
            row = choice.rows[name]._replace(seed_name=choice.rows[names[copy.original]].seed_name)
            choice.rows[name] = choice.convert[name] = row


def is_comparable(tensor: Tensor) -> bool:
    """Whether a tensor has floats that can be read, on this rank as a whole."""
    if type(tensor) not in (Tensor, nn.Parameter) or not can_be_read(tensor) or not tensor.is_floating_point():
        return False
    return tensor.untyped_storage().nbytes() > 0  # else FSDP2 has freed it


def sample(tensor: Tensor) -> tuple[float, ...] | None:
    """Some elements; None if they are all the same."""
    places = [
        torch.linspace(0, size - 1, SAMPLES, dtype=torch.float32, device=tensor.device).long() for size in tensor.shape
    ]
    values: list[float] = tensor.detach()[tuple(places)].float().tolist()
    return None if len({*values}) == 1 else tuple(values)


def _common_ending(name: str, other: str) -> str:
    endings = {*name_endings(other)}
    return next((ending for ending in name_endings(name) if ending in endings), "")
