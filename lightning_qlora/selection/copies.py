"""Copies of layers that a module made before conversion: averages of its weights (EMA, SWA), teachers, references.

After conversion the module trains adapters, and code that pairs the parameters of both averages others than before.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_qlora.layers.names import name_endings, owner_name, tensors_of, without_numbers
from lightning_qlora.selection.selection import Selection
from lightning_qlora.survey.parts import Parts
from lightning_qlora.tensors.values import can_be_read

COPIES = "_qlora_copies"  # attribute of a module while it is converted: the copies in it
SAMPLES = 16  # elements of a weight that are compared first
ALIKE = 0.99  # cosine
Values = tuple[float, ...] | None


class Copy(NamedTuple):
    name: str
    original: str
    is_parameter: bool

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
    (`nn.TransformerEncoder` makes its layers as copies of one). The module knows the copies until its conversion has
    ended: after an interrupt their originals are in 4 bits.
    """
    known: dict[str, list[Copy]] = vars(parts.root)
    copies = known.get(COPIES, [])
    matrices = [(name, each) for name, each in tensors_of(parts.named) if is_comparable(each) and each.ndim >= 2]
    of_shape: dict[torch.Size, set[str]] = {}
    for name, tensor in matrices:
        of_shape.setdefault(tensor.shape, set()).add(without_numbers(name))
    tensors = [(name, tensor) for name, tensor in matrices if len(of_shape[tensor.shape]) > 1]
    if tensors:
        copies = [*dict.fromkeys([*copies, *_equal_tensors(tensors, choice)])]
    if copies:
        known[COPIES] = copies
    return copies


def _equal_tensors(tensors: list[tuple[str, Tensor]], choice: Selection) -> list[Copy]:
    targets = {row.weight_name for row in choice.convert.values()}
    groups: dict[object, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        key = sample(tensor)
        if key is not None:
            groups.setdefault((tensor.shape, *key), []).append((name, tensor))
    copies = []
    for tensors in groups.values():
        for place, (name, tensor) in enumerate(tensors):
            earlier = [each for each in tensors[:place] if without_numbers(each[0]) != without_numbers(name)]
            if not earlier:
                continue
            original, values = max(earlier, key=lambda each: len(_common_ending(name, each[0])))
            if not {name, original} & targets or tensor.data_ptr() == values.data_ptr():
                continue
            if bool((tensor == values.to(tensor.device)).all()):
                copies.append(Copy(name, original, isinstance(tensor, nn.Parameter)))
    return copies


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


def sample(tensor: Tensor) -> Values:
    """Some elements; None if they are all the same."""
    places = [
        torch.linspace(0, size - 1, SAMPLES, dtype=torch.float32, device=tensor.device).long() for size in tensor.shape
    ]
    values: list[float] = tensor.detach()[tuple(places)].float().tolist()
    return None if len({*values}) == 1 else tuple(values)


def moved_towards(before: Values, after: Values, target: Values) -> bool:
    """Whether samples of a tensor moved straight to those of another one, as in an average; None are zeros."""
    start, end, goal = (torch.tensor(values or [0.0] * SAMPLES, device="cpu") for values in (before, after, target))
    return float(torch.cosine_similarity(end - start, goal - start, dim=0)) > ALIKE


def _common_ending(name: str, other: str) -> str:
    endings = {*name_endings(other)}
    return next((ending for ending in name_endings(name) if ending in endings), "")
