"""Which layers of a module become 4-bit, which stay dense, and why."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_qlora.bnb_layers import is_bnb_linear
from lightning_qlora.config import QLoRAConfig, fits
from lightning_qlora.kernels.ops import FLOATS
from lightning_qlora.linear import ATTRIBUTES, QLoRALinear

OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output_projection")  # names of models that do not say it themselves
ROUTERS = ("gate", "router")
TAKEN = ATTRIBUTES | set(dir(QLoRALinear))  # names that mean something to a 4-bit layer
HARMLESS = {
    "__init__", "__new__", "__init_subclass__", "__class_getitem__", "__module__", "__doc__", "__dict__", "__weakref__",
    "__annotations__", "__constants__", "extra_repr", "reset_parameters",
}  # fmt: skip


@dataclass
class Choice:
    """What conversion will do with each layer.

    Attributes:
        convert: Name -> layer that becomes a QLoRALinear.
        train: Name -> module that trains in full, and the reason.
        skip: Name -> why a linear layer stays as it is, frozen.
    """

    convert: dict[str, nn.Module] = field(default_factory=dict)
    train: dict[str, str] = field(default_factory=dict)
    skip: dict[str, str] = field(default_factory=dict)


def choose_layers(module: nn.Module, config: QLoRAConfig, part_of_module: bool = False) -> Choice:
    """Sort every linear layer of a module; layers that are in 4 bits with an adapter already are left out.

    One that was quantized while it was loaded counts as the layer it was: only now is its full name known.

    Args:
        module: The module.
        config: The choices.
        part_of_module: More modules will come, and names will be longer: a name that does not fit is no mistake.

    Raises:
        ValueError: If a name of target_modules or modules_to_save fits nothing, or fits a layer that is not linear, or
            a pattern of rank_pattern or alpha_pattern fits no layer to convert.
    """
    choice, layers, places = Choice(), dict(module.named_modules()), _places(module)

    def named(name: str, patterns: str | list[str]) -> bool:
        return any(matches(place, patterns) for place in places[id(layers[name])])

    def check_found(patterns: str | list[str], found: Iterable[str], argument: str) -> None:
        _check_found(patterns, [p for name in found for p in places[id(layers[name])]], argument, layers)

    for name in layers:
        if named(name, config.modules_to_save):
            choice.train[name] = "in modules_to_save"
    if not part_of_module:
        check_found(config.modules_to_save, choice.train, "modules_to_save")
    facts = _Facts(module)
    everything = config.target_modules == "all-linear"
    targets = [n for n in layers if n and not everything and named(n, config.target_modules)]
    for name, layer in layers.items():
        own = _own_behaviour(layer)
        if _is_settled(layer) or not (is_linear(layer) or own or name in targets):
            continue
        if any(inside(name, saved) for saved in choice.train if choice.train[saved] == "in modules_to_save"):
            continue
        if named(name, config.exclude_modules):
            choice.skip[name] = "in exclude_modules"
        elif not everything and name not in targets:
            choice.skip[name] = "not in target_modules"
        elif own and everything:
            choice.skip[name] = own
        elif own or not is_linear(layer):
            if part_of_module:
                continue
            raise ValueError(
                f"target_modules={config.target_modules!r} names {name!r}, a {type(layer).__name__}: "
                + (own or "only linear layers can be converted")
                + ". Name it in modules_to_save to train it in full."
            )
        elif reason := facts.unable(name, layer) or (facts.unasked(name, layer, config) if everything else None):
            choice.skip[name] = reason
        elif everything and (small := _too_small(layer, config.rank_of(name))):
            (choice.train if _trains(layer) else choice.skip)[name] = small
        elif 0 in _weight_shape(layer):
            choice.skip[name] = "its {}x{} weight is empty".format(*_weight_shape(layer))
        else:
            choice.convert[name] = layer
    if part_of_module:
        return choice
    if not everything:
        check_found(config.target_modules, targets, "target_modules")
    converted = [*choice.convert, *(name for name, layer in layers.items() if _is_settled(layer))]
    for argument in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, argument):
            if not any(fits(name, pattern) for name in converted):
                left = {name: why for name, why in {**choice.train, **choice.skip}.items() if fits(name, pattern)}
                raise ValueError(
                    f"{argument}: {pattern!r} fits none of the layers to convert: {converted}."
                    + "".join(f" {name}: {why}." for name, why in [*left.items()][:3])
                )
    return choice


def matches(name: str, patterns: str | list[str]) -> bool:
    """Whether a module's name fits, as in PEFT: a regular expression for all of it, or a list of its possible endings.

    The name counts with and without its first part, since the model stands under an attribute of the LightningModule.
    """
    if isinstance(patterns, str):
        return any(re.fullmatch(patterns, form) for form in (name, name.partition(".")[2]) if form)
    return any(name == ending or name.endswith("." + ending) for ending in patterns)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is an nn.Linear or a transformers Conv1D, and computes what those compute, in 4 bits or not."""
    if is_bnb_linear(layer) or isinstance(layer, QLoRALinear):
        return True
    if isinstance(layer, nn.Linear):
        return type(layer).forward is nn.Linear.forward
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def _own_behaviour(layer: nn.Module) -> str | None:
    """Why an nn.Linear of another class can't become a QLoRALinear; None for what can, and for what is none."""
    if not isinstance(layer, nn.Linear) or isinstance(layer, QLoRALinear) or is_bnb_linear(layer):
        return None
    kind = type(layer).__name__
    named = _own_names(layer)
    for name in ("forward", "__call__"):
        if name in named or (name == "forward" and not is_linear(layer)):
            return f"{kind} has a {name} of its own, which may compute something else than nn.Linear's"
    clash = next((name for name in sorted(named) if name in TAKEN and name not in HARMLESS), None)
    return clash and f"{kind} has a {clash} of its own, which a 4-bit layer would replace"


def _own_names(layer: nn.Module) -> set[str]:
    """What the user's classes define, and what the layer itself holds that an nn.Linear does not."""
    kinds = [kind for kind in type(layer).__mro__ if kind not in nn.Linear.__mro__]
    # torch's own: a parametrized or sharded layer, of which more is said elsewhere
    defined = {name for kind in kinds if not kind.__module__.startswith("torch.") for name in vars(kind)}
    held = {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules}
    return defined | (held & ATTRIBUTES)


def _is_settled(layer: nn.Module) -> bool:
    return isinstance(layer, QLoRALinear) and layer.loaded is None


def _trains(layer: nn.Module) -> bool:
    """Whether the user has not frozen a layer; what froze its 4-bit weight was bitsandbytes, or loading."""
    if isinstance(layer, QLoRALinear):
        return layer.lora_A.requires_grad
    return is_bnb_linear(layer) or layer.weight.requires_grad  # type: ignore[return-value]


class _Facts:
    """What can be known of a layer only by looking at the rest of the module."""

    def __init__(self, module: nn.Module) -> None:
        owners: dict[int, set[int]] = defaultdict(set)
        self.name_of: dict[int, str] = {}
        for name, layer in module.named_modules():
            for key, parameter in layer._parameters.items():
                if parameter is not None:
                    owners[id(parameter)].add(id(layer))
                    self.name_of.setdefault(id(parameter), f"{name}.{key}".lstrip("."))
        self.shared = {key for key, layers in owners.items() if len(layers) > 1}
        self.output_embeddings = {id(layer) for layer in _output_embeddings(module)}
        self.left_dense = {
            id(layer)
            for model in module.modules()
            if getattr(model, "is_loaded_in_4bit", False)
            for layer in model.modules()
            if not is_bnb_linear(layer) and not isinstance(layer, QLoRALinear)
        }
        self.parents = {
            f"{name}.{child}".lstrip("."): parent
            for name, parent in module.named_modules()
            for child, _ in parent.named_children()
        }

    def unable(self, name: str, layer: nn.Module) -> str | None:
        """Why a layer can't be converted even if it is asked for."""
        if isinstance(self.parents.get(name), nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight and never calls it"
        if isinstance(layer, QLoRALinear):
            return None
        weight = layer._parameters.get("weight")
        if weight is None:
            return "its weight is computed (parametrized), not stored"
        if "bias" not in layer._parameters:
            return "its bias is computed (parametrized), not stored"
        if weight.dtype not in FLOATS and not is_bnb_linear(layer):
            return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
        if id(weight) in self.shared:
            return f"its weight is tied to {self.name_of[id(weight)]}"
        return None

    def unasked(self, name: str, layer: nn.Module, config: QLoRAConfig) -> str | None:
        """Why a layer is left alone unless it is named."""
        last = name.rpartition(".")[2]
        if id(layer) in self.output_embeddings or last in OUTPUT_EMBEDDINGS:
            return "output embedding; name it in target_modules to convert it"
        if last in ROUTERS and hasattr(self.parents[name], "experts"):
            return "router of experts; name it in target_modules to convert it"
        if id(layer) in self.left_dense and not _too_small(layer, config.rank_of(name)):
            return "the 4-bit model it came with left it dense; name it in target_modules to convert it"
        return None


def _output_embeddings(module: nn.Module) -> Iterator[nn.Module]:
    for layer in module.modules():
        if callable(getattr(layer, "get_output_embeddings", None)):
            try:
                embedding = layer.get_output_embeddings()  # type: ignore[operator]
            except (NotImplementedError, AttributeError):  # transformers models without a head
                continue
            if embedding is not None:
                yield embedding


def _weight_shape(layer: nn.Module) -> tuple[int, int]:
    weight: Any = layer.weight
    rows, columns = weight.quant_state.shape if is_bnb_linear(layer) else weight.shape
    return rows, columns


def _too_small(layer: nn.Module, r: int) -> str | None:
    rows, columns = _weight_shape(layer)
    if r * (rows + columns) < rows * columns:
        return None
    return f"an adapter of rank {r} would be larger than its {rows}x{columns} weights"


def inside(name: str, outer: str) -> bool:
    """Whether a module's name is another's, or that of a part of it; all are parts of the root, ""."""
    return outer in ("", name) or name.startswith(outer + ".")


def _places(module: nn.Module) -> dict[int, list[str]]:
    """Id of a module -> its names: one that several share has several, and is chosen by any of them."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, part in module.named_modules(remove_duplicate=False):
        places[id(part)].append(name)
    return places


def _check_found(patterns: str | list[str], names: list[str], argument: str, layers: dict[str, nn.Module]) -> None:
    absent = [patterns] if isinstance(patterns, str) and not names else []
    if isinstance(patterns, list):
        absent = [pattern for pattern in patterns if not any(matches(name, [pattern]) for name in names)]
    if absent:
        endings = sorted({name.rpartition(".")[2] for name, layer in layers.items() if is_linear(layer) and name})
        raise ValueError(
            f"{argument}={patterns!r}: no module of this model fits {absent}. Its linear layers end in {endings}."
        )
