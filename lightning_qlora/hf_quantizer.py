"""A transformers quantizer that makes QLoRALinears of a model's layers while its weights are read, one at a time.

Imports transformers: only `loading` imports this file, and only when there is a transformers model to load.
Source of the interface: transformers 5, quantizers/base.py (HfQuantizer) and core_model_loading.py (ConversionOps).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_qlora.adapters.base_model import forget_quantizer
from lightning_qlora.adapters.folder import read_adapter
from lightning_qlora.adapters.module import adapter_within, config_of_adapter
from lightning_qlora.bnb_layers import decoded_as_it_came
from lightning_qlora.choose import choose_layers, is_linear
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.files import read_header
from lightning_qlora.linear import QLoRALinear
from lightning_qlora.loaded import Loaded, config_while_loading, may_need_weight
from lightning_qlora.quantize.packed import PackedWeight

METHOD = "lightning_qlora"


class QLoRAQuantizer(HfQuantizer):
    """Quantizes the layers that conversion would choose by the names they have now; all else loads as it always does.

    What is in 4 bits in the files is taken over wherever it is: conversion decodes what is to be dense.

    Args:
        config: The choices.
        pre_quantized: The files hold bitsandbytes' 4-bit weights, to be taken over byte for byte.
    """

    requires_calibration = False

    def __init__(self, config: QLoRAConfig, pre_quantized: bool) -> None:
        super().__init__(QuantizationConfigMixin(METHOD), pre_quantized=pre_quantized)  # type: ignore[arg-type]
        self.config = config
        self.chosen: set[str] = set()
        self.file_of: dict[str, Path] = {}  # key in the files -> file
        self.errors: list[ValueError] = []  # transformers gathers those of a load and raises one of its own
        self.misfits: list[ValueError] = []  # weights of another shape, which a call may allow

    def __deepcopy__(self, _: Any) -> "QLoRAQuantizer":
        """Itself: transformers copies its operations, and with them what they refer to."""
        return self

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Choose layers while the model is on the meta device."""
        for path in checkpoint_files or []:
            if str(path).endswith(".safetensors"):
                self.file_of |= dict.fromkeys(read_header(Path(path))[0], Path(path))
        config: QLoRAConfig | None = self.config
        if self.config.adapter is not None:
            adapter = adapter_within(model, read_adapter(self.config.adapter))
            config = None if adapter is None else config_of_adapter(model, adapter, self.config)
        if config is None:
            return
        self.config = config
        tied: Any = getattr(model, "all_tied_weights_keys", {})
        held_tied = {name.rpartition(".")[0] for name in [*tied, *tied.values()]}
        if self.pre_quantized:
            chosen = {name for name, layer in model.named_modules() if is_linear(layer)}
        else:
            chosen = set(choose_layers(model, config, part_of_module=True).convert)
        self.chosen = chosen - held_tied

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        """Leave a model that transformers takes for any other: `convert` does the rest."""
        forget_quantizer(model)
        if self.pre_quantized:
            model.is_loaded_in_4bit = True  # type: ignore[assignment]  # for `choose_layers`
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter of the files is the weight of a chosen layer."""
        layer, _, key = param_name.rpartition(".")
        return key == "weight" and layer in self.chosen

    def get_quantize_ops(self) -> ConversionOps:
        """What turns a float weight of the files into a 4-bit layer."""
        return _Quantize(self)

    serialized_names: Any = {  # noqa: RUF012, as upstream declares it
        "weight": [
            "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax",
            "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4", "weight",
        ]
    }  # fmt: skip

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """What takes over the 4-bit weights of the files."""
        return {"deserialize": _TakeOver}

    def is_serializable(self) -> bool:
        """Not through transformers; see `save_quantized`."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters train."""
        return True

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a quantized weight, for transformers' reservation of GPU memory."""
        return 0.5


class _Op(ConversionOps):
    def __init__(self, hf_quantizer: QLoRAQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # upstream looks for this name

    def kept(self, error: ValueError) -> ValueError:
        """The error, kept for `quantize_while_loading` to raise."""
        self.hf_quantizer.errors.append(error)
        return error

    def where(self, key: str) -> str:
        """The file of a key, for messages."""
        path = self.hf_quantizer.file_of.get(key)
        return "" if path is None else f"{path}: "

    def left_dense(self, key: str, weight: Tensor, place: Tensor) -> dict[str, Tensor]:
        """What makes transformers load a weight as it would any other."""
        self.hf_quantizer.chosen.discard(key.removesuffix(".weight"))
        return {key: weight.to(place.dtype)}

    def misfit(self, source: str, key: str, weight: Tensor, place: Tensor) -> dict[str, Tensor]:
        """Leave a weight of another shape to transformers: it refuses the load, or starts the layer anew."""
        message = f"{self.where(source)}{key!r} has shape {list(weight.shape)}, and the model has {list(place.shape)}"
        self.hf_quantizer.misfits.append(
            ValueError(
                f"{message} there. Load it with the config that belongs to the files, or pass "
                "ignore_mismatched_sizes=True to from_pretrained to start this layer anew."
            )
        )
        return self.left_dense(key, weight, place)

    @staticmethod
    def loaded(layer: nn.Module, name: str, loaded: Loaded, missing_keys: set[str] | None) -> dict[str, nn.Parameter]:
        """What a loaded layer gives back to transformers: its parameters, none of which is to be initialized."""
        assert isinstance(layer, QLoRALinear)
        layer.loaded = loaded
        layer._is_hf_initialized = True  # type: ignore[assignment]
        if missing_keys is not None:
            missing_keys.discard(f"{name}.weight")
        return {f"{name}.{key}": p for key, p in layer._parameters.items() if p is not None and key != "bias"}


class _Quantize(_Op):
    """The float weight of one layer -> the parameters of a QLoRALinear."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """See ConversionOps; one weight in, [out, in] or a Conv1D's [in, out]."""
        ((key, value),) = input_dict.items()
        name, layer = key.removesuffix(".weight"), model.get_submodule(key.removesuffix(".weight"))
        weight: Tensor = value[0] if isinstance(value, list) else value
        place, source, config = model.get_parameter(key), source_patterns[0], self.hf_quantizer.config
        if weight.shape != place.shape:
            return self.misfit(source, key, weight, place)
        path = self.hf_quantizer.file_of.get(source) if len(source_patterns) == 1 else None
        if path is None and may_need_weight(config):
            return self.left_dense(key, weight, place)
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        try:
            QLoRALinear.from_linear(layer, config_while_loading(config), name)
        except ValueError as error:
            raise self.kept(ValueError(f"{self.where(source)}{name}: {error}")) from error
        return self.loaded(layer, name, Loaded(weight.dtype, path=path, key=source), missing_keys)


class _TakeOver(_Op):
    """bitsandbytes' entries of one layer -> the parameters of a QLoRALinear, the same bytes."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: nn.Module,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """See ConversionOps; also meets every weight that is not in 4 bits."""
        state = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        name, place = full_layer_name.removesuffix(".weight"), model.get_parameter(full_layer_name)
        if set(state) == {"weight"}:
            return self.left_dense(full_layer_name, state["weight"], place)
        layer, config = model.get_submodule(name), self.hf_quantizer.config
        try:
            weight = PackedWeight.from_bnb_state_dict(state)
        except ValueError as error:
            raise self.kept(ValueError(f"{self.where(full_layer_name)}{name}.{error}")) from error
        turned = not isinstance(layer, nn.Linear) and weight.shape == place.shape[::-1]
        if weight.shape != place.shape and not turned:
            return self.misfit(full_layer_name, full_layer_name, weight.dequantize(), place)
        if name not in self.hf_quantizer.chosen:  # no linear layer, or a tied one
            decoded = decoded_as_it_came if turned or isinstance(layer, nn.Linear) else _decoded
            return {full_layer_name: decoded(layer, weight, place.dtype)}
        try:
            QLoRALinear.from_packed(layer, replace(weight, dtype=place.dtype), type(layer), config, name)
        except ValueError as error:
            raise self.kept(ValueError(f"{self.where(full_layer_name)}{name}: {error}")) from error
        return self.loaded(layer, name, Loaded(place.dtype, packed=True), missing_keys)


def _decoded(_: nn.Module, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype)
