"""A transformers quantizer that makes QLoRALinears of a model's layers while its weights are read, one at a time.

Imports transformers: only `loading` imports this file, and only when there is a transformers model to load.
Source of the interface: transformers 5, quantizers/base.py (HfQuantizer) and core_model_loading.py (ConversionOps).
"""

from dataclasses import replace
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
from lightning_qlora.choose import choose_layers
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.linear import QLoRALinear
from lightning_qlora.quantize.packed import PackedWeight

METHOD = "lightning_qlora"


class QLoRAQuantizer(HfQuantizer):
    """Quantizes the layers that conversion would choose; everything else loads as it always does.

    Args:
        config: The choices.
        pre_quantized: The files hold bitsandbytes' 4-bit weights, to be taken over byte for byte.
    """

    requires_calibration = False

    def __init__(self, config: QLoRAConfig, pre_quantized: bool) -> None:
        super().__init__(QuantizationConfigMixin(METHOD), pre_quantized=pre_quantized)  # type: ignore[arg-type]
        self.config = config
        self.chosen: set[str] = set()
        self.errors: list[ValueError] = []  # transformers gathers those of a load and raises one of its own

    def __deepcopy__(self, _: Any) -> "QLoRAQuantizer":
        """Itself: transformers copies its operations, and with them what they refer to."""
        return self

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        """Choose layers while the model is on the meta device."""
        config: QLoRAConfig | None = self.config
        if self.config.adapter is not None:
            adapter = adapter_within(model, read_adapter(self.config.adapter))
            config = None if adapter is None else config_of_adapter(model, adapter, self.config)
        if config is None:
            return
        self.config = config
        tied: Any = getattr(model, "all_tied_weights_keys", {})
        held_tied = {name.rpartition(".")[0] for name in [*tied, *tied.values()]}
        self.chosen = set(choose_layers(model, config, part_of_module=True).convert) - held_tied

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

    @staticmethod
    def loaded(layer: nn.Module, name: str, missing_keys: set[str] | None) -> dict[str, nn.Parameter]:
        """What a loaded layer gives back to transformers: its parameters, none of which is to be initialized."""
        assert isinstance(layer, QLoRALinear)
        layer._is_hf_initialized = True  # type: ignore[assignment]
        if missing_keys is not None:
            missing_keys.discard(f"{name}.weight")
        return {f"{name}.{key}": p for key, p in layer._parameters.items() if p is not None and key != "bias"}


class _Quantize(_Op):
    """The float weight of one layer -> the parameters of a QLoRALinear."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: nn.Module, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, nn.Parameter]:
        """See ConversionOps; one weight in, [out, in] or a Conv1D's [in, out]."""
        ((key, value),) = input_dict.items()
        name, layer = key.removesuffix(".weight"), model.get_submodule(key.removesuffix(".weight"))
        weight: Tensor = value[0] if isinstance(value, list) else value
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        try:
            QLoRALinear.from_linear(layer, self.hf_quantizer.config, name)
        except ValueError as error:
            raise self.kept(ValueError(f"{name}: {error}")) from error
        return self.loaded(layer, name, missing_keys)


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
        name = full_layer_name.removesuffix(".weight")
        place = model.get_parameter(full_layer_name)
        if set(state) == {"weight"}:
            return {full_layer_name: state["weight"].to(place.dtype)}
        layer = model.get_submodule(name)
        try:
            weight = PackedWeight.from_bnb_state_dict(state)
        except ValueError as error:
            raise self.kept(ValueError(f"{name}.{error}")) from error
        if name not in self.hf_quantizer.chosen:  # stays dense, as conversion leaves it
            return {full_layer_name: decoded_as_it_came(layer, weight, place.dtype)}
        weight = replace(weight, dtype=place.dtype)
        try:
            QLoRALinear.from_packed(layer, weight, type(layer), self.hf_quantizer.config, name)
        except ValueError as error:
            raise self.kept(ValueError(f"{name}: {error}")) from error
        return self.loaded(layer, name, missing_keys)
