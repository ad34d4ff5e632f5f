"""Models whose tensors have no data."""

import copy
import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_qlora.checks import one_line
from lightning_qlora.huggingface.base_folder import check_format, stored_format
from lightning_qlora.huggingface.model_config import ElsewhereError, model_without_values, read_model_config

LARGEST = 1 << 22  # elements of a real tensor: attention masks may have more


def fake_copy(module: nn.Module) -> nn.Module:
    """Copy a module, under FakeTensorMode; the parameters and buffers of the copy have no data."""
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(f"{name}: is a torch.jit.ScriptModule, which can't be copied without data. Leave it out.")
    tensors: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        tensors[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for part in module.modules():
        for value in (*part._buffers.values(), *vars(part).values()):
            if isinstance(value, Tensor):
                tensors[id(value)] = torch.empty(value.shape, dtype=value.dtype, device="cpu")
    return copy.deepcopy(module, tensors)


def meta_model(model: Any) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise TypeError(f"model={model!r}: is not a module, and transformers is not installed.") from error
    is_name = isinstance(model, (str, os.PathLike))
    if not is_name and not isinstance(model, transformers.PretrainedConfig):
        raise TypeError(
            f"model={type(model).__name__}: must be a module, a transformers config, a folder or a hub name."
        )
    try:
        config = model
        if is_name:
            config = read_model_config(model)
        stored = stored_format(config.to_dict())
        built: nn.Module = _model_of_config(config)
    except ElsewhereError:
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"{model}: neither a folder with a config.json nor a model on the hub ({one_line(error)})."
        ) from error
    except Exception as error:  # any error of the model's own code
        subject = f"model={type(model).__name__}: it"
        if is_name:
            subject = f"{model}: its config.json"
        raise ValueError(
            f"{subject} makes no model ({one_line(error)}). Correct it, or pass a module to estimate_memory."
        ) from error
    check_format(stored, getattr(config, "name_or_path", "") or type(config).__name__)
    return built


def _model_of_config(config: Any) -> Any:
    transformers: Any = import_module("transformers")
    name = next(iter(getattr(config, "architectures", None) or []), "")
    if not hasattr(transformers, name):
        autos = ("AutoModelForImageTextToText", "AutoModelForCausalLM")
        fitting = (auto for auto in autos if type(config) in getattr(transformers, auto)._model_mapping)
        name = next(fitting, "AutoModel")
    return model_without_values(config, name, dtype=getattr(config, "dtype", None) or torch.bfloat16)


class RealIndices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this, tensors that are computed from numbers and real tensors alone are real: positions and masks.

    The code of models reads such values: transformers omits the causal mask if the positions are those of one sequence
    a row. It is entered within a FakeTensorMode that allows real inputs.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        try:
            result = func(*args, **kwargs)  # without data, to know its size
            if any(isinstance(leaf, Tensor) and leaf.numel() > LARGEST for leaf in tree_leaves(result)):
                return result
        except (DataDependentOutputException, DynamicOutputShapeException):
            pass
        with unset_fake_temporarily():
            return func(*args, **kwargs)
