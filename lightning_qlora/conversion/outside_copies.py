"""Copies of a module's weights that are no part of it: averages (EMA, SWA), references, snapshots.

They were made before conversion, so an average in them can't follow the adapters. What code that runs can reach is
searched for tensors with the values of the weights. Nothing tells an average from a reference but the class of what
holds it, and later that something writes to it.

A list or a closure may hold the weights themselves. They stay what they were, so what is computed with them, or clips
their gradients, misses the adapters. Their references are counted, and later they may get a gradient.
"""

import gc
import logging
import re
import sys
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import CO_OPTIMIZED
from types import CodeType, FrameType, ModuleType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_qlora.conversion.report import ConversionReport, say
from lightning_qlora.layers.kinds import is_linear
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import last_part, outer_names, owner_name, tensors_of
from lightning_qlora.layers.qlora_linear import REPLACED, adapted_layers
from lightning_qlora.optim.optimizer_parameters import optimizer_parameters
from lightning_qlora.selection.copies import Values, is_comparable, moved_towards, sample
from lightning_qlora.tensors.dtensor import is_sharded
from lightning_qlora.tensors.readable import plain
from lightning_qlora.texts import ROOT

KINDS = (Tensor, nn.Parameter)
AVERAGES = {"ema", "swa", "average", "averaged", "averaging", "polyak", "shadow"}  # words in names of classes
FEWEST = 16  # elements of a tensor that is compared
MOST = 50_000  # objects that are searched, those nearest to running code first; a module is one
MANY = 10_000  # entries of a container that is data
CONTAINERS = (list, tuple, dict, set)
LEAVES = {str, bytes, int, float, bool, complex, type(None), torch.device, torch.dtype, torch.Size}
LEAVES |= {CodeType, logging.Logger}  # they lead to no tensor, but to each other: half of what a Trainer reaches
MAKE_AFTER = (
    "make it after conversion: in on_fit_start with the Trainer, after fabric.setup with Fabric, else after convert"
)
HELD = "{} holds a copy of it from before conversion, and an average in it can't follow the adapters: " + MAKE_AFTER
WRITTEN = (
    "something writes to a copy of it outside of the module, which was made before conversion. If that is an average, "
    f"it has wrong values, because it can't follow the adapters: {MAKE_AFTER}"
)
FAILED = (
    "{} has a dense weight, and converted layers have adapters in place of theirs, so code that pairs the parameters "
    f"of both fails. An average or a momentum target: {MAKE_AFTER}; or name the module that it follows in "
    "modules_to_save, which trains it in full."
)
COMPUTED = (
    "other code computes with its weight from before conversion, which a list, an attribute or a closure holds. The "
    "adapter is not in it, and gets no gradient from it: read layer.weight or parameters() at each use, or keep "
    "them after conversion, as in on_fit_start; or name the layer in modules_to_save, which trains it in full"
)
PAIRED = re.compile("size|shape|match|number|parameter|keys|lora_|weight", re.IGNORECASE)  # in the text of an error
OF_CONVERTED = (
    "This is the state dict of a converted module, which has adapters in place of dense weights. Load it into a "
    "copy.deepcopy of that module, or for a dense module call lightning_qlora.merge on a copy first."
)


@dataclass
class _Copy:
    """A tensor, which is not kept alive, and what was seen of it last."""

    name: str  # of the parameter that it is a copy of
    tensor: ref[Tensor]
    holder: str | None  # the class of the average that holds it
    version: int = 0
    values: Values = None

    def look(self, compares: bool) -> None:
        tensor = self.tensor()
        if tensor is not None:
            self.version = tensor._version
            if compares:
                self.values = sample(tensor)

    def has_changed(self, compares: bool) -> bool:
        tensor = self.tensor()
        if tensor is None:
            return False
        return tensor._version != self.version or (compares and sample(tensor) != self.values)

    def follows(self, layers: Mapping[str, LoRALayer]) -> bool:
        """Whether its values moved towards W + s B A of its layer, as code that reads `layer.weight` moves them."""
        tensor = self.tensor()
        layer: Any = layers.get(self.name) or layers.get(owner_name(self.name))
        if tensor is None or layer is None or is_sharded(layer.packed) or layer.weight.shape != tensor.shape:
            return False
        with torch.no_grad():
            values, weight = sample(tensor), sample(plain(layer.weight))
        return moved_towards(self.values, values, weight)


class OutsideCopies:
    """The tensors outside of a module that have the values of its parameters. Create it before conversion.

    Attributes:
        layers: Names of the converted layers whose weights have copies, or are held; known after `note`.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = [*module.named_modules()]
        tensors, holders, self._optimizers = _search({id(part) for _, part in modules})
        self._copies = [*_copies_of(modules, tensors, holders)]
        self._weights = {name: ref(weight) for name, weight in tensors_of(modules, ["_parameters"])}
        self._watched: list[_Copy] = []
        self._looks = 0
        self.layers: list[str] = []

    def note(self, report: ConversionReport) -> None:
        """Note the copies in the report of the conversion; without a copy of the weight of a layer there are none."""
        alive = [copy for copy in self._copies if copy.tensor() is not None]
        names = {name for copy in alive for name in (copy.name, owner_name(copy.name))}
        copied = names.intersection(report.converted)  # of layers, or of parameters with experts
        if not copied:
            alive = []
        self._copies = self._watched = alive
        originals = self._originals_with_holders()
        self._optimizers = []
        self._weights = {name: ref(weight) for name, weight in originals.items() if weight.grad is None}
        of_originals = {name if name in report.converted else owner_name(name) for name in originals}
        self.layers = sorted(copied | of_originals)
        holders = sorted({copy.holder for copy in alive if copy.holder is not None})
        for holder in holders:
            report.note(HELD.format(holder), [self.place])
        report.copied = sorted(of_originals) if holders else self.layers

    def _originals_with_holders(self) -> dict[str, Tensor]:
        """The weights that conversion replaced, and that something holds which is no optimizer."""
        groups = {id(optimizer.param_groups): optimizer for optimizer in self._optimizers}  # wrappers have the same
        in_optimizers = Counter(id(weight) for each in groups.values() for weight in optimizer_parameters(each))
        originals: dict[str, Tensor] = {}
        for collects in (False, True):  # of what is gone, and refers to itself
            if collects and originals:
                originals.clear()
                gc.collect()
            alive: dict[str, Any] = {name: weight() for name, weight in self._weights.items()}  # or None
            names = [name for name, weight in alive.items() if hasattr(weight, REPLACED)]
            tensors = [*map(alive.pop, names), torch.empty(0, dtype=torch.uint8, device="cpu")]
            alive.clear()
            counts = [sys.getrefcount(tensor) - in_optimizers[id(tensor)] for tensor in tensors]
            none = counts.pop()  # of a tensor that nothing else holds
            originals = {name: tensors[i] for i, name in enumerate(names) if counts[i] > none}
            del tensors
            if not originals:
                break
        return originals

    @property
    def place(self) -> str:
        """The name of the part of the module that holds all of the layers."""
        first, *others = ([*outer_names(owner_name(name))] for name in self.layers)
        return next(name for name in first if all(name in outer for outer in others))

    def named(self) -> Iterator[tuple[str, Tensor]]:
        return ((copy.name, tensor) for copy in self._copies if (tensor := copy.tensor()) is not None)

    def computed_with(self) -> list[str]:
        """Names of weights that conversion replaced, and that got a gradient since."""
        alive = {name: weight for name, each in self._weights.items() if (weight := each()) is not None}
        return [name for name, weight in alive.items() if weight.grad is not None]

    def are_written(self, module: nn.Module) -> bool:
        """Whether something writes to the copies that is no optimizer, and no average of the weights of the module.

        The first call says no, and after an answer nobody looks at the copies any more. A write through `.data` leaves
        no trace but the values, which are compared at the calls 1, 2, 4, 8, ...
        """
        self._looks += 1
        compares = self._looks & (self._looks - 1) == 0
        if self._looks == 1 or not any(copy.has_changed(compares) for copy in self._watched):
            for copy in self._watched:
                copy.look(compares)
            return False
        trained = parameters_of_optimizers()
        copies = [copy for copy in self._watched if id(copy.tensor()) not in trained]
        self._watched = []
        layers = adapted_layers(module)
        is_written = any(copy.has_changed(True) for copy in copies)
        return is_written and not any(copy.follows(layers) for copy in copies)


def parameters_of_optimizers(*without: Optimizer) -> set[int]:
    """Ids of the parameters that an optimizer holds, of all that exist but these."""
    ids = set[int]()
    groups = {id(optimizer.param_groups) for optimizer in without}  # Lightning's wrappers have the same
    for value in gc.get_objects():
        if issubclass(type(value), Optimizer) and id(getattr(value, "param_groups", None)) not in groups:
            ids.update(map(id, optimizer_parameters(value)))
    return ids


def tensors_in(value: Any, depth: int = 2) -> Iterator[Tensor]:
    """The tensors that an object holds: itself, in a list or dict, a module, or attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            if isinstance(each, Tensor) or depth > 1:
                yield from tensors_in(each, depth - 1)
    elif isinstance(value, nn.Module) and "_modules" in vars(value):
        yield from (tensor for _, tensor in tensors_of([*value.named_modules()]))
    if depth > 1 and hasattr(value, "__dict__"):
        for each in [*vars(value).values()]:
            yield from tensors_in(each, depth - 1)


def _copies_of(
    modules: list[tuple[str, nn.Module]], tensors: list[Tensor], holders: Mapping[int, str]
) -> Iterator[_Copy]:
    inside = {id(tensor) for _, tensor in tensors_of(modules)}
    of_shape: dict[object, list[tuple[str, Tensor]]] = {}
    dense = [(name, part) for name, part in modules if not isinstance(part, LoRALayer)]  # others were converted before
    for name, parameter in tensors_of(dense, ["_parameters"]):
        if is_comparable(parameter) and parameter.numel() >= FEWEST:
            of_shape.setdefault(parameter.shape, []).append((name, parameter))
    places = {parameter.data_ptr() for values in of_shape.values() for _, parameter in values}
    names: dict[object, dict[object, str]] = {}  # of the parameters of a shape, by their values
    for tensor in tensors:
        if not is_comparable(tensor) or tensor.shape not in of_shape or id(tensor) in inside:
            continue
        if tensor.shape not in names:
            names[tensor.shape] = {sample(parameter): name for name, parameter in of_shape[tensor.shape]}
        values = sample(tensor)
        if values is not None and values in names[tensor.shape] and tensor.data_ptr() not in places:
            yield _Copy(names[tensor.shape][values], ref(tensor), holders.get(id(tensor)))


def _search(known: set[int]) -> tuple[list[Tensor], dict[int, str], list[Optimizer]]:
    """What the functions which run can reach: tensors, ids of those in averages -> the class, and optimizers.

    A walk over all objects takes 0.3 s. `known`: ids of the modules that are converted; those that are found join them.
    """
    seen = {id(vars(module)) for module in [*sys.modules.values()] if isinstance(module, ModuleType)}
    of_modules: dict[int, dict[str, Any]] = {}
    queue = deque[Any]()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        queue.extend(_variables(frame))
        of_modules[id(frame.f_globals)] = frame.f_globals
        frame = frame.f_back
    for variables in of_modules.values():
        queue.extend(variables.values())
    tensors: list[Tensor] = []
    holders: dict[int, str] = {}
    optimizers: list[Optimizer] = []
    is_average: dict[type, bool] = {}
    left = MOST
    while queue and left:
        value = queue.popleft()
        kind = type(value)
        if kind in LEAVES or id(value) in seen or issubclass(kind, (type, ModuleType)):
            continue
        seen.add(id(value))
        left -= 1
        if kind not in is_average:
            words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", kind.__name__)
            is_average[kind] = not AVERAGES.isdisjoint(word.lower() for word in words)
        if kind in KINDS:
            tensors.append(value)
            continue
        if issubclass(kind, Optimizer) and hasattr(value, "param_groups"):
            optimizers.append(value)
        if is_average[kind] or (issubclass(kind, nn.Module) and id(value) not in known):  # before all that is as near
            inside = {id(tensor): tensor for tensor in tensors_in(value) if type(tensor) in KINDS}
            tensors.extend(tensor for number, tensor in inside.items() if number not in seen)
            seen.update(inside)
            if is_average[kind]:
                holders.update(dict.fromkeys(inside, kind.__name__))
            if issubclass(kind, nn.Module) and "_modules" in vars(value):  # else its __init__ has not ended
                known.update(map(id, value.modules()))
        if kind not in CONTAINERS or len(value) <= MANY:
            queue.extend(gc.get_referents(value))
    return tensors, holders, optimizers


def _variables(frame: FrameType) -> list[Any]:
    """The variables of a function that runs; its dict of them, which Python before 3.13 keeps, is cleared."""
    variables = frame.f_locals
    values = [*variables.values()]
    is_function = frame.f_code.co_flags & CO_OPTIMIZED
    if sys.version_info < (3, 13) and is_function and sys.getrefcount(variables) == 3:  # nobody called `locals()`
        variables.clear()
    return values


def advice_for(error: BaseException, module: nn.Module, outside: OutsideCopies | None) -> str | None:
    """What to do about an error of code that pairs parameters of converted layers with those of dense ones.

    None if the two innermost functions have none of both in their variables.
    """
    if not PAIRED.search(str(error)):
        return None
    adapted = {part for part in module.modules() if isinstance(part, LoRALayer)}
    adapters = {_place(parameter) for part in adapted for parameter in part.parameters(recurse=False)}
    dense: list[tuple[str, Tensor]] = []
    if outside is not None:
        dense = [(f"a copy of {owner_name(name) or ROOT}", tensor) for name, tensor in outside.named()]
    for name, part in module.named_modules():
        if is_linear(part) and part not in adapted and isinstance(part._parameters.get("weight"), Tensor):
            dense.append((name or ROOT, part._parameters["weight"]))
    names = {_place(tensor): name for name, tensor in dense if _place(tensor) is not None}
    for frame, _ in [*traceback.walk_tb(error.__traceback__)][:-3:-1]:  # the innermost first
        modules = [value for value in frame.f_locals.values() if isinstance(value, nn.Module)]
        others = [value for value in frame.f_locals.values() if not isinstance(value, nn.Module)]
        if frame.f_code.co_name == "load_state_dict" and _has_adapters(frame.f_locals.get("state_dict")):
            return OF_CONVERTED
        places = {_place(tensor) for value in others for tensor in tensors_in(value)} - {None}
        has_adapters = not places.isdisjoint(adapters)
        has_adapters |= any(not adapted.isdisjoint(each.modules()) for each in modules)
        if has_adapters and not places.isdisjoint(names):
            return FAILED.format(next(name for place, name in names.items() if place in places))
    return None


def _has_adapters(state_dict: Any) -> bool:
    return isinstance(state_dict, dict) and any(last_part(str(key)) == "lora_A" for key in state_dict)


def add_advice(error: BaseException, text: str) -> None:
    """Put advice under the traceback of an error; before Python 3.11 it is printed."""
    if sys.version_info >= (3, 11):
        error.add_note(f"QLoRA: {text}")
    else:
        say(text)


def _place(tensor: Any) -> int | None:
    """Where the values of a tensor are, the same for `detach()` of it; None if that is not known."""
    return tensor.untyped_storage().data_ptr() if is_comparable(tensor) else None
