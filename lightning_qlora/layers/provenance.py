"""Where the values of a module come from: loaded, new, frozen or tied; and so, why a layer stays dense.

New is what is outside of a model that was loaded, or was not in its files.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.expert_selection import ExpertParameter, is_router
from lightning_qlora.layers.kinds import is_packed
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import is_transformers_model, join
from lightning_qlora.layers.qlora_linear import MEMBERS, QLoRALinear
from lightning_qlora.quantization.blockwise import FLOATS

LOADED = "_qlora_loaded"  # attribute of a model that was quantized while it loaded: whether its files were in 4 bits
OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output_projection")  # for models without get_output_embeddings
ROUTERS = ("gate", "router")
FROZEN = "frozen by the module"
LARGE_RANK = "an adapter of rank"  # beginning of a reason
CLASSIFIERS = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")  # names of transformers' classes
HEADS = ("score", "classifier", "qa_outputs")  # names of the head where a model does not say which part is its base
OUTSIDE = "new: outside"  # beginning of a reason
LOADED_TENSOR = "_is_hf_initialized"  # transformers 5 sets it on each tensor that it found in the files
MARKED = "_qlora_marked"  # attribute of a module: keys of its parameters that had this mark (`keep_marks`)
FEWEST = 64  # weights, one block of the default size: 4 bits would save nothing


def name_clash(layer: nn.Module | ExpertParameter) -> str | None:
    """Why a subclass of nn.Linear can't become a QLoRALinear; None if it can, and for other layers."""
    if not isinstance(layer, nn.Linear) or isinstance(layer, QLoRALinear) or is_packed(layer):
        return None
    kinds = [kind for kind in type(layer).__mro__ if kind not in nn.Linear.__mro__]
    # torch's own classes are parametrized or sharded layers, which other checks refuse
    names = {name for kind in kinds if not kind.__module__.startswith("torch.") for name in vars(kind)}
    if "__call__" in names:
        return f"{type(layer).__name__} has a __call__ of its own, which may compute something else than nn.Linear's"
    names |= {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules} - {"weight"}
    clash = min(names & MEMBERS, default=None)
    return clash and f"{type(layer).__name__} has a {clash} of its own, which a 4-bit layer would replace"


class ModuleFacts:
    """What depends on the rest of the module."""

    def __init__(self, module: nn.Module) -> None:
        owners: dict[int, dict[nn.Module, str]] = defaultdict(dict)
        for name, layer in module.named_modules():
            for key, parameter in layer._parameters.items():
                if parameter is not None:
                    owners[id(parameter)][layer] = join(name, key)
        # bitsandbytes freezes what it quantizes, so there the rest of a model decides whether the user froze it.
        self.trains = any(parameter.requires_grad for parameter in module.parameters())
        self.frozen_models: set[int] = set()
        for model in _models(module):
            if not any(parameter.requires_grad for parameter in model.parameters()):
                self.frozen_models |= {id(layer) for layer in model.modules()}
        # Id of a tied parameter -> the modules that hold it, with its name in each.
        self.shared = {key: layers for key, layers in owners.items() if len(layers) > 1}
        self.output_embeddings = {id(layer) for layer in get_output_embeddings(module)}
        self.left_dense: set[int] = set()
        for model in module.modules():
            if getattr(model, "is_loaded_in_4bit", False) or vars(model).get(LOADED):
                dense = (part for part in model.modules() if not (is_packed(part) or isinstance(part, LoRALayer)))
                self.left_dense |= {id(part) for part in dense}
        self.modules = dict(module.named_modules())

    def is_frozen(self, layer: nn.Module, key: str = "weight") -> bool:
        """Whether the module froze the weight of a layer, while something else trains."""
        if is_packed(layer) or not self.trains:
            return self.trains and id(layer) in self.frozen_models
        if isinstance(layer, LoRALayer):
            key = "lora_A"
        parameters: dict[str, Any] = layer._parameters
        return not parameters[key].requires_grad

    def cannot_convert(self, layer: nn.Module | ExpertParameter) -> str | None:
        """Why a layer, or a parameter of experts, can't be converted, even if target_modules names it."""
        if isinstance(layer, ExpertParameter):
            if layer.loaded is not None:
                return None
            return self._cannot_quantize(layer.owner, layer.owner._parameters[layer.key])
        if isinstance(layer, QLoRALinear):
            return None
        for key in ("weight", "bias"):
            if key not in layer._parameters:
                return f"its {key} is computed (parametrized), not stored"
        return self._cannot_quantize(layer, layer._parameters["weight"], is_packed(layer))

    def _cannot_quantize(self, owner: nn.Module, weight: Any, in_4_bits: bool = False) -> str | None:
        """Why a weight of a module can't be quantized."""
        if weight.dtype not in FLOATS and not in_4_bits:
            reason = f"its weight is {str(weight.dtype).removeprefix('torch.')}"
            if "float8" in reason:
                reason += "; load the model in configure_model or plugin.init(), where it is dequantized"
            return reason
        if id(weight) in self.shared:
            others = [name for holder, name in self.shared[id(weight)].items() if holder is not owner]
            return f"its weight is tied to {others[0]}"
        return None

    def not_by_default(self, name: str, layer: nn.Module | ExpertParameter, config: QLoRAConfig) -> str | None:
        """Why a layer, or a parameter of experts, is converted only if target_modules names it."""
        if isinstance(layer, ExpertParameter):
            owner = layer.owner if layer.loaded is None else layer.loaded
            return FROZEN if self.is_frozen(owner, layer.key) else None
        outer, _, last = name.rpartition(".")
        if id(layer) in self.output_embeddings or last in OUTPUT_EMBEDDINGS:
            return "output embedding; name it in target_modules to convert it"
        if (last in ROUTERS and hasattr(self.modules[outer], "experts")) or is_router(name, layer, self.modules):
            return "router of experts; name it in target_modules to convert it"
        if self.is_frozen(layer):
            return FROZEN
        if id(layer) in self.left_dense and not too_small(shape_of(layer), config):
            return "dense in a model that was loaded in 4 bits; name it in target_modules to convert it"
        return None


def get_output_embeddings(module: nn.Module) -> Iterator[nn.Module]:
    """What `get_output_embeddings` of every model in a module returns."""
    for layer in module.modules():
        if callable(getattr(layer, "get_output_embeddings", None)):
            try:
                embedding = layer.get_output_embeddings()  # type: ignore[operator]
            except (NotImplementedError, AttributeError):  # transformers models without a head
                continue
            if embedding is not None:
                yield embedding


def shape_of(layer: nn.Module | ExpertParameter) -> tuple[int, int]:
    """The shape of a weight as it is stored; of one in 4 bits, and of an expert, [out, in]."""
    if isinstance(layer, ExpertParameter):
        return layer.shape
    weight: Any = layer.weight
    if is_packed(layer):
        weight = weight.quant_state
    rows, columns = weight.shape
    return rows, columns


def too_small(shape: tuple[int, int], config: QLoRAConfig) -> str | None:
    """Why 4 bits and an adapter would not be smaller than a weight of this shape; None if they are."""
    rows, columns = shape
    if rows * columns <= FEWEST:
        return f"its {rows}x{columns} weights are too few for 4 bits"
    if config.r * (rows + columns) < rows * columns:
        return None
    return f"{LARGE_RANK} {config.r} would not be smaller than its {rows}x{columns} weights"


def new_parameters(root: nn.Module) -> dict[int, str]:
    """Id -> reason, of each trainable parameter that has to train in full because its value is random.

    If a transformers model was loaded, that is everything outside of such models. In each model it is the head of a
    model for classification, and what `from_pretrained` of transformers 5 reported as newly initialized.
    """
    for part in root.modules():
        _mark(part._parameters.get(key) for key in vars(part).get(MARKED, ()))
    new: dict[int, str] = {}
    models = loaded_models(root)
    if models:
        kinds = " and ".join(dict.fromkeys(type(model).__name__ for model in models))
        inside = {id(parameter) for model in models for parameter in model.parameters()}
        new |= {id(p): f"{OUTSIDE} of the loaded {kinds}" for p in root.parameters() if id(p) not in inside}
    for model in _models(root):
        for parameter in _head(model):
            new.setdefault(id(parameter), f"new: classification head of the {type(model).__name__}")
        if _is_marked(model):
            for parameter in _without_mark(model):
                new[id(parameter)] = "new: initialized when the model was loaded"
    frozen = {id(parameter) for parameter in root.parameters() if not parameter.requires_grad}
    return {key: reason for key, reason in new.items() if key not in frozen}


def loaded_models(root: nn.Module) -> list[nn.Module]:
    """The transformers models in a module that were loaded from weights, without those inside another one."""
    models = _models(root)
    inner = {id(part) for model in models for part in model.modules() if part is not model}
    outermost = [model for model in models if id(model) not in inner]
    # A copy of a loaded model has lost the marks of its tensors, but not its name.
    return [model for model in outermost if _is_marked(model) or getattr(model, "name_or_path", None)]


def mark_as_loaded(root: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Give parameters that replace others the mark of those, so that they are not taken for new ones."""
    ids = {id(p) for model in _models(root) if _is_marked(model) for p in model.parameters()}
    _mark(parameter for parameter in parameters if id(parameter) in ids)


def keep_marks(model: nn.Module) -> None:
    """Let a loaded model keep the marks of its parameters while a strategy replaces them by sharded ones."""
    for part in model.modules():
        vars(part)[MARKED] = [key for key, p in part._parameters.items() if p is not None and _has_mark(p)]


def _mark(parameters: Iterable[Tensor | None]) -> None:
    for parameter in parameters:
        if parameter is not None:
            setattr(parameter, LOADED_TENSOR, True)


def _head(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a classification model outside of its base model."""
    if CLASSIFIERS.search(type(model).__name__):
        base = getattr(model, str(model.base_model_prefix), None)
        for name, child in model.named_children():
            is_head = name in HEADS
            if isinstance(base, nn.Module):
                is_head = child is not base
            if is_head:
                yield from child.parameters()


def _without_mark(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that were in no file; a layer that the files have in part, such as all but its bias, has none."""
    for part in model.modules():
        parameters = [parameter for parameter in part._parameters.values() if parameter is not None]
        if part._modules or not any(map(_has_mark, parameters)):
            yield from (parameter for parameter in parameters if not _has_mark(parameter))


def _models(root: nn.Module) -> list[nn.Module]:
    return [part for part in root.modules() if is_transformers_model(part)]


def _has_mark(parameter: Tensor) -> bool:
    return bool(getattr(parameter, LOADED_TENSOR, False))


def _is_marked(model: nn.Module) -> bool:
    return any(map(_has_mark, model.parameters()))
