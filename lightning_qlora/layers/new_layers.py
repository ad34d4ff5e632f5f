"""Layers of transformers models that have no pretrained weights: classification heads, and what a load left out."""

import re
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from lightning_qlora.layers.names import is_transformers_model

CLASSIFIERS = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")  # names of transformers' classes
HEADS = ("score", "classifier", "qa_outputs")  # names of the head where a model does not say which part is its base
LOADED_TENSOR = "_is_hf_initialized"  # transformers 5 sets it on each tensor that it found in the files


def new_layers(root: nn.Module) -> dict[int, str]:
    """Id -> reason, of each layer that has to be trained in full because its values are random.

    These are layers that `from_pretrained` of transformers 5 reported as newly initialized, and layers in the head of a
    model for classification. A head that the user froze, and that was loaded, is none.
    """
    new: dict[int, str] = {}
    for model in root.modules():
        if is_transformers_model(model):
            for layer in _heads(model):
                if all(parameter.requires_grad for parameter in layer.parameters()):
                    new.setdefault(id(layer), f"classification head of the {type(model).__name__}")
            if any(_was_loaded(parameter) for parameter in model.parameters()):
                for layer in _leaves(model):
                    if not any(_was_loaded(parameter) for parameter in layer.parameters()):
                        new[id(layer)] = "newly initialized when the model was loaded"
    return new


def mark_as_loaded(root: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Give parameters that replace others the mark of those, so that their layers are not taken for new ones."""
    models = [model for model in root.modules() if is_transformers_model(model)]
    loaded = {id(p) for model in models if any(map(_was_loaded, model.parameters())) for p in model.parameters()}
    for parameter in parameters:
        if id(parameter) in loaded:
            setattr(parameter, LOADED_TENSOR, True)


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a classification model outside of its base model."""
    if CLASSIFIERS.search(type(model).__name__):
        base = getattr(model, str(model.base_model_prefix), None)
        for name, child in model.named_children():
            if child is not base if isinstance(base, nn.Module) else name in HEADS:
                yield from _leaves(child)


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that have float parameters and no modules inside."""
    for part in module.modules():
        parameters = [parameter for parameter in part._parameters.values() if parameter is not None]
        if parameters and not part._modules and any(parameter.is_floating_point() for parameter in parameters):
            yield part


def _was_loaded(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, LOADED_TENSOR, False))
