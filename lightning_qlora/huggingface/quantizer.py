"""A transformers quantizer that makes 4-bit layers of a model's layers and experts while its weights are read.

One dense weight is in memory at a time. Where transformers joins tensors of the files to a stack of experts, each
expert is quantized before the next one is read. A folder in another quantized format is read by transformers' quantizer
of that format: its operations dequantize each tensor, and ours follow. A GGUF file is dequantized by transformers as a
whole.

This file imports transformers, so `quantize_while_loading` imports it only if transformers is installed.
Source of the interface: transformers 5, quantizers/base.py (HfQuantizer) and core_model_loading.py (ConversionOps).
"""

import copy
import re
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.adapters.base_folder import CANNOT_DEQUANTIZE, can_compose, takes_dequantize
from lightning_qlora.adapters.peft_folder import read_adapter
from lightning_qlora.adapters.save_load import config_of_adapter
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.files.safetensors_folder import WEIGHTS, WeightFolder, read_header
from lightning_qlora.huggingface.load_weights import (
    Version,
    find_without_data,
    mark_as_found,
    read_weights,
    versions,
)
from lightning_qlora.huggingface.model_folder import ModelFolder
from lightning_qlora.huggingface.operations import (
    LOAD_WHOLE,
    Compose,
    LoadPacked,
    Nothing,
    Quantize,
    wrong_shape,
)
from lightning_qlora.huggingface.patches import (
    forget_quantizer,
    request_dequantizing,
    unwrap_operations,
    wrap_operations,
)
from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.expert_selection import ExpertParameter
from lightning_qlora.layers.names import last_part, named, named_tensors, owner_name
from lightning_qlora.layers.packed_linear import to_parameters
from lightning_qlora.layers.qlora_linear import QLoRALinear, check_packed_initialization
from lightning_qlora.layers.reasons import LOADED, keep_marks
from lightning_qlora.layers.selection import ToConvert, select_layers
from lightning_qlora.quantization.codebooks import OF_BITSANDBYTES

COMPOSES = can_compose()
SHARD = re.compile(r"model-\d+-of-\d+")  # name of one of several files of weights
STORED = [  # the entries of bitsandbytes for a weight
    "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax",
    *(f"weight.quant_state.bitsandbytes__{kind}" for kind in OF_BITSANDBYTES), "weight",
]  # fmt: skip


class Quantizers:
    """Makes the quantizers of the models that are loaded within one `quantize_while_loading`."""

    def __init__(self, config: QLoRAConfig, sharding: bool = False, adapter: Adapter | None = None) -> None:
        self.config, self.sharding = config, sharding
        # Models that wait for `fully_shard`, their folders, and the versions of their tensors.
        self.on_meta: list[tuple[nn.Module, ModelFolder, list[Version]]] = []
        # Errors for weights with a wrong shape in the last load; not raised if it may `ignore_mismatched_sizes`.
        self.mismatches: list[ValueError] = []
        # The adapter to start from, until the first model that has its layers gets it.
        self.adapter = read_adapter(config.adapter) if config.adapter is not None else adapter
        self.of_adapter = self.adapter is not None

    def quantizer_for(
        self, model_config: Any, device_map: Any, gguf_file: str | None, ask: Callable[[Any], tuple[Any, Any, Any]]
    ) -> tuple[Any, Any, Any]:
        """The quantizer of a model, its config and device_map; `ask` returns transformers' own choice of these.

        If transformers can't dequantize the format of the files while it loads, that choice is returned.
        """
        text_config = model_config.get_text_config(decoder=True)
        stored = getattr(model_config, "quantization_config", None) or getattr(text_config, "quantization_config", None)
        found: dict[str, Any] = (stored if stored is None or isinstance(stored, dict) else stored.to_dict()) or {}
        if gguf_file is not None:
            kind = getattr(import_module("transformers"), "GgufConfig", None)
            return ask(kind and kind(dequantize=True))
        if not found or found.get("load_in_4bit"):
            return QLoRAQuantizer(self, in_4_bits=bool(found)), model_config, device_map
        if takes_dequantize(found):
            request_dequantizing(model_config, found)
        why = (
            f"{model_config.name_or_path}: is in {found.get('quant_method')!r}, so its layers would not be converted. "
            f"{CANNOT_DEQUANTIZE}"
        )
        try:
            own, model_config, device_map = ask(None)
        except ImportError as error:
            raise ImportError(str(error) if takes_dequantize(found) else why) from error
        dequantizes = getattr(getattr(own, "quantization_config", None), "dequantize", False)
        if own is not None and not dequantizes:
            warnings.warn(why, stacklevel=2)
        if dequantizes and COMPOSES:
            own = QLoRAQuantizer(self, own)
        return own, model_config, device_map

    def config_for(self, model: nn.Module) -> QLoRAConfig | None:
        """The arguments for a model; None if the adapter to start from belongs to another one."""
        if not self.of_adapter:
            return self.config
        names = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
        adapter = self.adapter
        if adapter is None or not names.issuperset(adapter.targets):
            return None
        self.adapter = None
        return config_of_adapter(model, adapter, self.config)


class QLoRAQuantizer(HfQuantizer):
    """Quantizes the layers that conversion would choose, by their names in the model; all else loads as usual.

    If the files hold bitsandbytes' 4-bit weights (in_4_bits), these are loaded without requantizing. If they hold
    another format, `own` is transformers' quantizer of it.
    """

    requires_calibration = False

    def __init__(self, quantizers: Quantizers, own: Any = None, in_4_bits: bool = False) -> None:
        pre_quantized = in_4_bits or own is not None  # then transformers reads tensors in the type of the files
        super().__init__(QuantizationConfigMixin("lightning_qlora"), pre_quantized=pre_quantized)  # type: ignore[arg-type]
        self.quantizers, self.own, self.in_4_bits = quantizers, own, in_4_bits
        self.chosen: dict[str, ToConvert] = {}  # by the name of the parameter
        self.file_of: dict[str, Path] = {}  # key in the files -> file
        self.shapes: dict[str, torch.Size] = {}  # of the model's tensors before they are loaded
        self.errors: list[ValueError] = []
        self.folder: ModelFolder | None = None  # of a model whose weights are read after it is sharded

    def __deepcopy__(self, _: Any) -> "QLoRAQuantizer":
        """Itself: transformers copies its operations, and with them what they refer to."""
        return self

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **arguments: Any
    ) -> None:
        """Check the files by their headers, and choose layers, while the model is on the meta device."""
        self.quantizers.mismatches.clear()
        plan: Any = getattr(model.config, "distributed_config", None)
        if (self.own is not None or self.pre_quantized) and (getattr(plan, "tp_size", None) or 1) > 1:
            raise ValueError(f"{type(model).__name__}: {LOAD_WHOLE}")
        if self.own is not None:
            self.own.preprocess_model(model, checkpoint_files=checkpoint_files, **arguments)
        paths = [Path(path) for path in checkpoint_files or [] if str(path).endswith(".safetensors")]
        if paths and all(SHARD.fullmatch(path.stem) for path in paths):
            self.file_of = WeightFolder(paths[0].parent).file_of  # checks the index too
        else:
            self.file_of = {key: path for path in paths for key in read_header(path)[0]}
        self.shapes = {name: tensor.shape for name, tensor in named_tensors(model)}
        config = self.quantizers.config_for(model)
        if config is None:
            return
        choice = select_layers(model, config)
        stacks = {name: each for name, each in choice.convert.items() if isinstance(each.part, ExpertParameter)}
        others = ((name, each) for name, each in choice.convert.items() if name not in stacks)
        self.chosen = {f"{name}.weight".lstrip("."): each for name, each in others}
        keys: Any = getattr(model, "all_tied_weights_keys", {})
        for key in (*keys, *keys.values()):  # will be tied when they are loaded
            self.chosen.pop(f"{owner_name(key)}.weight", None)
        for key in self.chosen if self.in_4_bits else ():
            with named(key.removesuffix(".weight")):
                check_packed_initialization(config)
        if COMPOSES or not self.in_4_bits:  # else they are dense in the files, and conversion quantizes them
            self.chosen |= stacks
        if self.file_of and self._is_sharded_next(model, paths):
            self._convert_without_data(model, paths[0].parent)

    def _is_sharded_next(self, model: nn.Module, paths: list[Path]) -> bool:
        """Whether `fully_shard` splits the model before its weights are needed, so that they can be read after it."""
        plan: Any = getattr(model.config, "distributed_config", None)  # DistributedConfig(fsdp_size=n)
        is_folder = [path.name for path in paths] == [WEIGHTS] or all(SHARD.fullmatch(path.stem) for path in paths)
        shards_next = self.quantizers.sharding or (getattr(plan, "fsdp_size", None) or 1) > 1
        config = self.quantizers.config
        needs_values = self.pre_quantized or config.trainable_token_indices
        return shards_next and not needs_values and is_folder

    def _convert_without_data(self, model: nn.Module, folder: Path) -> None:
        """Convert the layers that the files have, on the meta device."""
        self.folder = ModelFolder(folder, copy.deepcopy(model))
        for key, chosen in self.chosen.items():
            entry = self.folder.entries.get(key)
            found = entry.shape == self.shapes[key] if entry else f"{key}.0" in self.folder.entries
            if found:
                name = key if isinstance(chosen.part, ExpertParameter) else key.removesuffix(".weight")
                for layer in chosen.convert(name).values():
                    assert isinstance(layer, QLoRALinear)
                    layer.loaded = True
        to_parameters(model)

    def load_without_data(self, load: Callable[..., Any], model: nn.Module, load_config: Any) -> Any:
        """What `PreTrainedModel._load_pretrained_model` returns, for a model whose values are read later."""
        assert self.folder is not None
        found = find_without_data(self.folder, load, load_config)
        mark_as_found(model, self.folder)
        for name, shape, expected in found[0].mismatched_keys:
            key = self.folder.key_of.get(name, name)
            self.quantizers.mismatches.append(self.error(key, wrong_shape(key, shape, expected)))
        return found

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """transformers' conversions of the files, each followed by ours."""
        if not COMPOSES or self.folder is not None:  # its values are read later
            return super().update_weight_conversions(weight_conversions, *model)  # type: ignore
        quantizer: Any = super() if self.own is None else self.own
        conversions: list[Any] = quantizer.update_weight_conversions(weight_conversions, *model)
        if self.pre_quantized:  # tensors that their conversions do not make; "$": patterns match the end
            names = sorted({last_part(key) for key in self.chosen})
            conversions += [WeightConverter(f"{name}$", name, [Nothing()]) for name in names]
        last = Quantize(self) if self.pre_quantized else None  # else transformers adds it where we want it
        wrap_operations(conversions, lambda operations: Compose(self, operations), last)
        return conversions

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        """Raise the first error; without one, remove transformers' marks: conversion does the rest."""
        if self.errors:
            raise self.errors[0]
        # transformers before 5.23 does not compare shapes if there is a quantizer.
        for name, tensor in named_tensors(model):
            if tensor.shape != self.shapes.get(name, tensor.shape):
                known = self.quantizers.mismatches  # these name the files of converted weights too
                raise known[0] if known else self.error(name, wrong_shape(name, tensor.shape, self.shapes[name]))
        unwrap_operations(model, Compose)
        if self.own is not None:
            self.own._process_model_after_weight_loading(model)
            self.own.remove_quantization_config(model)
        forget_quantizer(model)
        setattr(model, LOADED, self.in_4_bits)
        if self.quantizers.sharding:
            keep_marks(model)
        if self.folder is not None and any(map(is_sharded, model.parameters())):
            read_weights(model, self.folder)
        elif self.folder is not None:
            self.quantizers.on_meta.append((model, self.folder, versions(model)))
        elif self.quantizers.sharding:
            to_parameters(model)
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter of the model is the weight of a chosen layer, or a chosen stack of experts."""
        return param_name in self.chosen

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that turns a float weight of the files into a 4-bit layer."""
        return Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The operation that loads 4-bit weights of the files."""
        load = WeightConverter(source_patterns=STORED, target_patterns="weight", operations=[LoadPacked(self)])
        return [load] if self.in_4_bits else []

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See HfQuantizer."""
        return dtype if self.own is None else self.own.update_dtype(dtype)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """See HfQuantizer."""
        if self.own is not None:
            return self.own.get_new_dtype(converter, param, dtype)  # type: ignore[no-any-return]
        return super().get_new_dtype(converter, param, dtype)

    def error(self, key: str, message: str) -> ValueError:
        """An error that names the file of a key."""
        path = self.file_of.get(key)
        return ValueError(message if path is None else f"{path}: {message}")

    def is_serializable(self) -> bool:
        """Not through transformers; `checkpoint="full"` saves a 4-bit base."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters train."""
        return True

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes of a weight, for transformers' reservation of GPU memory."""
        return 0.5 if self.param_needs_quantization(model, param_name) else param.element_size()
