"""Models that transformers loads without values, before they are sharded; `load_weights.py` reads these after that.

The chosen layers are converted on the meta device. For all else tensors with the shapes in the files become those of a
dense copy of the model on the meta device; its types, and its marks of what the files lack, are set on the model.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.huggingface.model_folder import ModelFolder
from lightning_qlora.huggingface.operations import wrong_shape
from lightning_qlora.huggingface.sharded import patches as _patches  # noqa: F401, `make_changes` makes its change
from lightning_qlora.huggingface.sharded.load_weights import NO_VALUES, read_weights
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import join, named_tensors
from lightning_qlora.layers.packed_layer import to_parameters
from lightning_qlora.selection.apply import convert_layer
from lightning_qlora.selection.selection import Row
from lightning_qlora.survey.provenance import LOADED_TENSOR
from lightning_qlora.tensors.dtensor import is_sharded

Version = tuple[str, Tensor, int]  # name of a tensor on the meta device, and its version when its model was loaded


class LaterWeights:
    """The weights of one model, which are read after it is sharded."""

    def __init__(self, quantizer: Any, model: nn.Module, folder: Path, shapes: dict[str, torch.Size]) -> None:
        self._quantizer = quantizer  # the `QLoRAQuantizer` of the load
        self._folder = ModelFolder(folder, copy.deepcopy(model))
        self._versions: list[Version] = []
        self._model = model
        _convert(model, self._folder, quantizer.chosen, shapes)

    def load(self, load: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """What `PreTrainedModel._load_pretrained_model` returns."""
        folder = self._folder
        load_config = replace(arguments["load_config"], device_map={"": "meta"}, hf_quantizer=None)
        empty = {key: torch.empty(entry.shape, device="meta") for key, entry in folder.stored.entries.items()}
        of_copy = {"model": folder.model, "state_dict": empty, "checkpoint_files": None, "load_config": load_config}
        result = load(**{**arguments, **of_copy})
        mark_as_found(arguments["model"], folder)
        for name, shape, expected in result[0].mismatched_keys:
            key = folder.key_of.get(name, name)
            error = self._quantizer.error(key, wrong_shape(key, shape, expected))
            self._quantizer.loading.mismatches.append(error)
        return result

    def take(self, model: nn.Module) -> None:
        """The model is loaded: read its values now if it is sharded, else at the end of `quantize_while_loading`."""
        self._model = model
        if any(map(is_sharded, model.parameters())):
            read_weights(model, self._folder)
        else:
            self._versions = [(name, t, t._version) for name, t in named_tensors(model) if t.is_meta]
            self._quantizer.loading.later.append(self)

    def read(self) -> None:
        """Read the values; ValueError for a tensor to which code wrote meanwhile: that would be lost."""
        for name, tensor, number in self._versions:
            if tensor._version != number:
                raise ValueError(f"{name}: configure_model wrote values to it, which would be lost. {NO_VALUES}")
        read_weights(self._model, self._folder)

    def explain(self, error: RuntimeError) -> None:
        if "meta" in str(error):
            raise RuntimeError(f"{error} {NO_VALUES}") from error


def _convert(model: nn.Module, folder: ModelFolder, chosen: dict[str, Row], shapes: dict[str, torch.Size]) -> None:
    for key, each in chosen.items():
        entry = folder.entries.get(key)
        if f"{key}.0" in folder.entries or (entry is not None and entry.shape == shapes[key]):
            convert_layer(each).is_unfinished = True
    to_parameters(model)


def mark_as_found(model: nn.Module, folder: ModelFolder) -> None:
    """Set the types and marks of the dense copy, `folder.model`, on the tensors of a model on the meta device."""
    dense: Any = folder.model
    sources = dict(named_tensors(dense))
    for name, part in model.named_modules():
        if isinstance(part, LoRALayer):
            weight = part.weight_name(part.reported_name(name))
            part.dtype_before = dense.get_parameter(weight).dtype
            part.weight_dtype = part.dtype_before
            part._is_hf_initialized = part._parameters.get("bias") is None  # type: ignore[assignment]
        for key, parameter in part._parameters.items():
            same = sources.get(join(name, key))
            if parameter is not None and same is not None and parameter.dtype is not same.dtype:
                cast = torch.empty_like(parameter, dtype=same.dtype)
                part._parameters[key] = nn.Parameter(cast, requires_grad=parameter.requires_grad)
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            same = sources.get(join(name, key))  # None: of a 4-bit layer
            if tensor is not None and (same is None or hasattr(same, LOADED_TENSOR)):
                setattr(tensor, LOADED_TENSOR, True)
