"""transformers quantizers that make 4-bit layers of a model's layers and experts while its weights are read.

    QLoRAQuantizer           files in 16 or 32 bits: each weight is quantized when it was read
    PackedQuantizer          bitsandbytes' 4 bits are loaded without requantizing
    DequantizingQuantizer    transformers' quantizer of another format dequantizes each tensor, and ours follows

One dense weight is in memory at a time, and of a stack of experts one expert; `operations.py` has what happens with it.
This file imports transformers, so `quantize_while_loading` imports it only if transformers is installed.
Source of the interface: transformers 5, quantizers/base.py (HfQuantizer) and core_model_loading.py (ConversionOps).
"""

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.adapters.load import config_of_adapter
from lightning_qlora.adapters.peft_folder import read_adapter
from lightning_qlora.config import QLoRAConfig, arguments_that
from lightning_qlora.files.safetensors_folder import WEIGHTS, WeightFolder, read_header
from lightning_qlora.huggingface.base_folder import CANNOT_DEQUANTIZE, can_compose, stored_format, takes_dequantize
from lightning_qlora.huggingface.operations import LOAD_WHOLE, Compose, LoadPacked, Nothing, Quantize, wrong_shape
from lightning_qlora.huggingface.patches import Choice, forget_quantizer
from lightning_qlora.huggingface.sharded.without_data import LaterWeights
from lightning_qlora.layers.names import join, last_part, named, named_tensors, owner_name
from lightning_qlora.layers.packed_layer import to_parameters
from lightning_qlora.quantization.codebooks import OF_BITSANDBYTES
from lightning_qlora.selection.selection import Row, select_layers
from lightning_qlora.starts.starts import check_packed_start
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.provenance import LOADED, keep_marks

COMPOSES = can_compose()
SHARD = re.compile(r"model-\d+-of-\d+")  # name of one of several files of weights
STORED = [  # the entries of bitsandbytes for a weight
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_map",
    "weight.absmax",
    *(f"weight.quant_state.bitsandbytes__{kind}" for kind in OF_BITSANDBYTES),
    "weight",
]


class Loading:
    """What the models that load within one `quantize_while_loading` have in common.

    Attributes:
        later: Weights that are read at the end.
        mismatches: Errors for weights with a wrong shape in the last load, which may `ignore_mismatched_sizes`.
    """

    def __init__(self, config: QLoRAConfig, sharding: bool, adapter: Adapter | None) -> None:
        self.config = config
        self.sharding = sharding
        self.later: list[Any] = []
        self.mismatches: list[ValueError] = []
        if config.adapter is not None:
            adapter = read_adapter(config.adapter)
        self._adapter = adapter  # to start from: the first model that has its layers gets it
        self._adapter_is_used = False

    def config_for(self, model: nn.Module) -> QLoRAConfig | None:
        """The arguments for a model; None if the adapter to start from belongs to another one."""
        if self._adapter is None:
            return self.config
        names = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
        if self._adapter_is_used or not names.issuperset(self._adapter.modules):
            return None
        self._adapter_is_used = True
        return config_of_adapter(Parts.of(model), self._adapter, self.config)

    def quantizer_for(
        self, model_config: Any, device_map: Any, gguf_file: str | None, ask: Callable[[Any], Choice]
    ) -> Choice:
        """The quantizer of a model, its config and device_map; `ask` returns transformers' own choice of these."""
        if gguf_file is not None:  # transformers dequantizes it as a whole
            gguf_config = getattr(transformers, "GgufConfig", None)
            return ask(gguf_config and gguf_config(dequantize=True))
        text_config = model_config.get_text_config(decoder=True)
        stored = stored_format({"text_config": text_config.to_dict(), **model_config.to_dict()})
        if not stored:
            return QLoRAQuantizer(self), model_config, device_map
        if stored.get("load_in_4bit"):
            return PackedQuantizer(self), model_config, device_map
        can_dequantize = takes_dequantize(stored)
        if can_dequantize:
            model_config.update({"quantization_config": stored | {"dequantize": True}})
        reason = (
            f"{model_config.name_or_path}: is in {stored.get('quant_method')!r}, so its layers would not be converted. "
            f"{CANNOT_DEQUANTIZE}"
        )
        try:
            quantizer, model_config, device_map = ask(None)
        except ImportError as error:
            if can_dequantize:
                reason = str(error)
            raise ImportError(reason) from error
        dequantizes = getattr(getattr(quantizer, "quantization_config", None), "dequantize", False)
        if quantizer is not None and not dequantizes:
            warnings.warn(reason, stacklevel=2)
        if dequantizes and COMPOSES:
            quantizer = DequantizingQuantizer(self, quantizer)
        return quantizer, model_config, device_map


class QLoRAQuantizer(HfQuantizer):
    """Quantizes the layers that conversion would choose, by their names in the model; all else loads as usual.

    Attributes:
        chosen: Name of each parameter that becomes 4-bit layers -> what they are.
        errors: Those of single weights: the first one is raised when all weights were read.
        later: The weights of a model that are read after it is sharded (`LaterWeights`); None for other models.
    """

    pre_quantized = False  # whether transformers reads tensors in the type of the files

    def __init__(self, loading: Loading) -> None:
        super().__init__(QuantizationConfigMixin("lightning_qlora"), pre_quantized=self.pre_quantized)  # type: ignore[arg-type]
        self.loading = loading
        self.chosen: dict[str, Row] = {}
        self.file_of: dict[str, Path] = {}  # by key in the files
        self.errors: list[ValueError] = []
        self.later: Any = None
        self._shapes: dict[str, torch.Size] = {}  # of the model's tensors before they are loaded

    def __deepcopy__(self, _: Any) -> "QLoRAQuantizer":
        """Itself: transformers copies its operations, and with them what they refer to."""
        return self

    # What is converted: before the weights are read.

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Check the files by their headers, and choose layers. The model is on the meta device."""
        self.loading.mismatches.clear()
        plan = getattr(model.config, "distributed_config", None)  # of transformers
        splits, shards = ((getattr(plan, name, None) or 1) > 1 for name in ("tp_size", "fsdp_size"))
        if splits and (self.pre_quantized or shards):
            raise ValueError(f"{type(model).__name__}: {LOAD_WHOLE}")
        paths = [Path(path) for path in checkpoint_files or [] if str(path).endswith(".safetensors")]
        in_shards = all(SHARD.fullmatch(path.stem) for path in paths)
        if paths and in_shards:
            self.file_of = WeightFolder(paths[0].parent).file_of  # checks the index too
        else:
            self.file_of = {key: path for path in paths for key in read_header(path)[0]}
        self._shapes = {name: tensor.shape for name, tensor in named_tensors(model)}
        config = self.loading.config_for(model)
        if config is None:
            return
        self.chosen = self.choose(model, config)
        is_folder = bool(self.file_of) and (in_shards or [path.name for path in paths] == [WEIGHTS])
        of_values = any(getattr(config, name) for name in arguments_that("needs_values"))
        needs_values = self.pre_quantized or splits or of_values
        if (shards or self.loading.sharding) and is_folder and not needs_values:
            self.later = LaterWeights(self, model, paths[0].parent, self._shapes)

    def choose(self, model: nn.Module, config: QLoRAConfig) -> dict[str, Row]:
        chosen = {each.weight_name: each for each in select_layers(model, config).convert.values()}
        keys: Any = getattr(model, "all_tied_weights_keys", {})
        for key in (*keys, *keys.values()):  # will be tied when they are loaded
            chosen.pop(join(owner_name(key), "weight"), None)
        return chosen

    # How a weight is read.

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        return param_name in self.chosen

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *model)  # type: ignore
        if self.later is None:
            conversions = self.followed_by_ours(conversions)
        return conversions

    def followed_by_ours(self, conversions: list[Any]) -> list[Any]:
        """Copies of conversions that also make the 4-bit layers; others, which only rename tensors, as they are.

        A model is saved by the conversions that loaded it, so these stay as they are.
        """
        if not COMPOSES:
            return conversions
        if self.pre_quantized:  # tensors that their conversions do not make; "$": patterns match the end
            names = sorted({last_part(key) for key in self.chosen})
            conversions = conversions + [WeightConverter(f"{name}$", name, [Nothing()]) for name in names]
        result = []
        for conversion in conversions:
            copied = conversion
            if hasattr(conversion, "operations"):
                copied = copy.copy(conversion)
                copied.operations = [Compose(self, conversion)]
                # Where the files are dense, transformers adds it itself.
                copied.quantization_operation = Quantize(self) if self.pre_quantized else None
            result.append(copied)
        return result

    # The model after its weights were read.

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        """Raise the first error; without one, remove transformers' marks: conversion does the rest."""
        if self.errors:
            raise self.errors[0]
        for name, tensor in named_tensors(model):  # transformers before 5.23 compares none if it has a quantizer
            expected = self._shapes.get(name, tensor.shape)
            if tensor.shape != expected:
                error = self.error(name, wrong_shape(name, tensor.shape, expected))
                raise next(iter(self.loading.mismatches), error)  # these name the files of converted weights too
        forget_quantizer([model])
        setattr(model, LOADED, isinstance(self, PackedQuantizer))
        if self.loading.sharding or self.later is not None:
            keep_marks(model)
        if self.later is not None:
            self.later.take(model)
        elif self.loading.sharding:
            to_parameters(model)
        return model

    def error(self, key: str, message: str) -> ValueError:
        path = self.file_of.get(key)
        if path is not None:
            message = f"{path}: {message}"
        return ValueError(message)

    # What transformers asks of every quantizer.

    def is_serializable(self) -> bool:
        """Not through transformers; `checkpoint="full"` saves a 4-bit base."""
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes of a weight, for transformers' reservation of GPU memory."""
        if self.param_needs_quantization(model, param_name):
            return 0.5
        return param.element_size()


class PackedQuantizer(QLoRAQuantizer):
    pre_quantized = True

    def choose(self, model: nn.Module, config: QLoRAConfig) -> dict[str, Row]:
        """As for dense files. Without `COMPOSES` experts are dense, and conversion quantizes them."""
        chosen = super().choose(model, config)
        for key, each in list(chosen.items()):
            if each.stack is None:
                with named(owner_name(key)):
                    check_packed_start(config)
            elif not COMPOSES:
                del chosen[key]
        return chosen

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [WeightConverter(source_patterns=STORED, target_patterns="weight", operations=[LoadPacked(self)])]


class DequantizingQuantizer(QLoRAQuantizer):
    pre_quantized = True

    def __init__(self, loading: Loading, original: Any) -> None:
        super().__init__(loading)
        self._original = original  # transformers' quantizer
        self.update_dtype = original.update_dtype  # type: ignore[method-assign]
        self.get_new_dtype = original.get_new_dtype  # type: ignore[method-assign]

    def _process_model_before_weight_loading(self, model: nn.Module, *args: Any, **arguments: Any) -> None:
        self._original.preprocess_model(model, *args, **arguments)
        super()._process_model_before_weight_loading(model, *args, **arguments)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        return self.followed_by_ours(self._original.update_weight_conversions(weight_conversions, *model))

    def _process_model_after_weight_loading(self, model: nn.Module, **arguments: Any) -> nn.Module:
        if not self.errors:
            self._original._process_model_after_weight_loading(model)
        return super()._process_model_after_weight_loading(model, **arguments)
