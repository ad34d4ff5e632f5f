"""A transformers quantizer that makes 4-bit layers of a model's layers and experts while its weights are read.

One weight is in memory at a time. A parameter of experts counts as one weight: transformers stacks the experts of the
files in two steps, so two copies of the largest stack are in memory at the peak.

This file imports transformers, so `quantize_while_loading` imports it only if transformers is installed.
Source of the interface: transformers 5, quantizers/base.py (HfQuantizer) and core_model_loading.py (ConversionOps).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_qlora.adapters.peft_experts import modules_of
from lightning_qlora.adapters.peft_reader import read_adapter
from lightning_qlora.adapters.save_load import config_of_adapter
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.files.safetensors_folder import WeightFolder, read_header
from lightning_qlora.huggingface.patches import forget_quantizer
from lightning_qlora.layers.dense_reasons import LOADED
from lightning_qlora.layers.dotted_names import expert_name, last_part, owner_name
from lightning_qlora.layers.experts import QLoRAExperts
from lightning_qlora.layers.kinds import decode_and_store_original, is_linear, kind_of
from lightning_qlora.layers.names import named, named_tensors
from lightning_qlora.layers.qlora_linear import QLoRALinear, check_packed_initialization
from lightning_qlora.layers.selection import StackToConvert, ToConvert, select_in_part
from lightning_qlora.layers.tensor_parallel import SPLIT_EXPERTS, split, unknown_style
from lightning_qlora.quantization.codebooks import OF_BITSANDBYTES
from lightning_qlora.quantization.packed_weight import PackedWeight

STORED = [  # the entries of bitsandbytes for a weight
    "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax",
    *(f"weight.quant_state.bitsandbytes__{kind}" for kind in OF_BITSANDBYTES), "weight",
]  # fmt: skip


class Quantizers:
    """Makes the quantizers of the models that are loaded within one `quantize_while_loading`."""

    def __init__(self, config: QLoRAConfig) -> None:
        self.config = config
        # Errors for weights of another shape, of the load that began last, which may `ignore_mismatched_sizes`.
        self.mismatches: list[ValueError] = []
        # The adapter to start from, until the first model that has its layers gets it.
        self.adapter = None if config.adapter is None else read_adapter(config.adapter)

    def quantizer_for(self, model_config: Any) -> "QLoRAQuantizer | None":
        """The quantizer of a model; None for a model in another quantized format."""
        stored = getattr(model_config, "quantization_config", None)
        stored = stored if stored is None or isinstance(stored, dict) else stored.to_dict()
        if stored is not None and not stored.get("load_in_4bit"):
            return None
        self.mismatches.clear()
        return QLoRAQuantizer(self, pre_quantized=stored is not None)

    def config_for(self, model: nn.Module) -> QLoRAConfig | None:
        """The arguments for a model; None if the adapter to start from belongs to another one."""
        if self.config.adapter is None:
            return self.config
        names = {name for name, _ in model.named_modules()}
        if self.adapter is None or not names.issuperset(modules_of(self.adapter)):
            return None
        adapter, self.adapter = self.adapter, None
        return config_of_adapter(model, adapter, self.config)


class QLoRAQuantizer(HfQuantizer):
    """Quantizes the layers that conversion would choose, by their names in the model; all else loads as usual.

    If the files hold bitsandbytes' 4-bit weights (pre_quantized), these are loaded without requantizing.
    """

    requires_calibration = False

    def __init__(self, quantizers: Quantizers, pre_quantized: bool) -> None:
        super().__init__(QuantizationConfigMixin("lightning_qlora"), pre_quantized=pre_quantized)  # type: ignore[arg-type]
        self.quantizers = quantizers
        self.chosen: dict[str, ToConvert | StackToConvert] = {}  # by the name of the parameter
        self.file_of: dict[str, Path] = {}  # key in the files -> file
        self.shapes: dict[str, torch.Size] = {}  # of the model's tensors before they are loaded
        self.errors: list[ValueError] = []

    def __deepcopy__(self, _: Any) -> "QLoRAQuantizer":
        """Itself: transformers copies its operations, and with them what they refer to."""
        return self

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Check the files by their headers, and choose layers, while the model is on the meta device."""
        paths = [Path(path) for path in checkpoint_files or [] if str(path).endswith(".safetensors")]
        if paths and all(re.fullmatch(r"model-\d+-of-\d+", path.stem) for path in paths):
            self.file_of = WeightFolder(paths[0].parent).file_of  # checks the index too
        else:
            self.file_of = {key: path for path in paths for key in read_header(path)[0]}
        self.shapes = {name: tensor.shape for name, tensor in named_tensors(model)}
        config = self.quantizers.config_for(model)
        if config is None:
            return
        choice = select_in_part(model, config)
        self.chosen = {f"{name}.weight".lstrip("."): layer for name, layer in choice.convert.items()}
        keys: Any = getattr(model, "all_tied_weights_keys", {})
        for key in (*keys, *keys.values()):  # will be tied when they are loaded
            self.chosen.pop(f"{owner_name(key)}.weight", None)
        for key in self.chosen if self.pre_quantized else ():
            with named(key.removesuffix(".weight")):
                check_packed_initialization(config)
        if not self.pre_quantized:  # else they are dense in the files, and conversion quantizes them
            self.chosen |= choice.stacks

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        """Raise the first error; without one, remove transformers' marks: conversion does the rest."""
        if self.errors:
            raise self.errors[0]
        for name, tensor in named_tensors(model):  # transformers before 5.23 compares none if there is a quantizer
            if tensor.shape != self.shapes.get(name, tensor.shape):
                known = self.quantizers.mismatches  # these name the files of converted weights too
                raise known[0] if known else self.error(name, _wrong_shape(name, tensor.shape, self.shapes[name]))
        forget_quantizer(model)
        setattr(model, LOADED, self.pre_quantized)
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter of the model is the weight of a chosen layer, or a chosen stack of experts."""
        return param_name in self.chosen

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that turns a float weight of the files into a 4-bit layer."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The operation that loads 4-bit weights of the files."""
        load = WeightConverter(source_patterns=STORED, target_patterns="weight", operations=[_LoadPacked(self)])
        return [load] if self.pre_quantized else []

    def error(self, key: str, message: str) -> ValueError:
        """An error that names the file of a key."""
        path = self.file_of.get(key)
        return ValueError(message if path is None else f"{path}: {message}")

    def is_serializable(self) -> bool:
        """Not through transformers; see `save_quantized`."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters train."""
        return True

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes of a weight, for transformers' reservation of GPU memory."""
        return 0.5 if self.param_needs_quantization(model, param_name) else param.element_size()


def _wrong_shape(key: str, shape: Sequence[int], expected: Sequence[int]) -> str:
    return (
        f"{key!r} has shape {list(shape)}, and the model has {list(expected)} there. Load it with the config that "
        "belongs to the files, or pass ignore_mismatched_sizes=True to from_pretrained to initialize this layer anew "
        "(transformers 5.23 and newer)."
    )


class _Op(ConversionOps):
    def __init__(self, hf_quantizer: QLoRAQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # upstream looks for this name

    def dense(self, key: str, weight: Tensor) -> dict[str, Tensor]:
        """Let transformers load a weight as usual."""
        self.hf_quantizer.chosen.pop(key, None)
        return {key: weight}

    def mismatch(self, source: str, key: str, shape: tuple[int, ...], place: Tensor) -> dict[str, Tensor]:
        """Let transformers see a weight of another shape: it refuses the load, or initializes the layer."""
        message = _wrong_shape(key, shape, place.shape)
        return self._without_values(source, key, shape, place, message, self.hf_quantizer.quantizers.mismatches)

    def failed(self, source: str, key: str, place: Tensor, message: str) -> dict[str, Tensor]:
        """Keep an error until all weights are read: transformers would only log what is raised before."""
        return self._without_values(source, key, place.shape, place, message, self.hf_quantizer.errors)

    def _without_values(
        self, source: str, key: str, shape: tuple[int, ...], place: Tensor, message: str, errors: list[ValueError]
    ) -> dict[str, Tensor]:
        errors.append(self.hf_quantizer.error(source, message))
        return self.dense(key, torch.zeros((), dtype=place.dtype, device="cpu").expand(shape))  # takes no memory

    @staticmethod
    def quantized(layers: dict[str, nn.Module], key: str, missing_keys: set[str] | None) -> dict[str, Tensor]:
        """The parameters, by name, of the layers that one parameter became; transformers sets them again."""
        if missing_keys is not None:
            missing_keys.discard(key)
        made: dict[str, Tensor] = {}
        for prefix, layer in layers.items():
            assert isinstance(layer, QLoRALinear)
            layer.loaded = True
            # The files may lack a bias: then the marks of the single tensors tell transformers what to initialize.
            layer._is_hf_initialized = layer.bias is None  # type: ignore[assignment]
            own = layer.named_parameters(prefix, recurse=False)
            # Of a distributed parameter, transformers takes the part of this rank.
            made |= {name: p.to_local() if isinstance(p, DTensor) else p for name, p in own if p is not layer.bias}
        return made


class _Quantize(_Op):
    """Float weights, and stacks of experts, -> the parameters of QLoRALinears."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """See ConversionOps; several weights where transformers split a tensor."""
        made: dict[str, Any] = {}
        for key, value in input_dict.items():
            weight: Tensor = value[0] if isinstance(value, list) else value
            if self.hf_quantizer.param_needs_quantization(model, key):
                made |= self.quantize(key, weight, source_patterns[0], model, missing_keys)
            else:
                made[key] = weight
        return made

    def quantize(
        self, key: str, weight: Tensor, source: str, model: nn.Module, missing_keys: set[str] | None
    ) -> dict[str, Any]:
        """The parameters of one layer, or of all experts."""
        place, chosen = model.get_parameter(key), self.hf_quantizer.chosen[key]
        part = place.to_local() if isinstance(place, DTensor) else place
        if isinstance(place, DTensor) and weight.shape == part.shape:
            if message := _not_splittable(place, chosen):
                return self.failed(source, key, part, f"{key}: {message}")
            # Every rank read its part; to quantize, one weight at a time is gathered.
            weight = DTensor.from_local(weight, place.device_mesh, place.placements, run_check=False).full_tensor()
        if weight.shape != place.shape:
            return self.mismatch(source, key, weight.shape, place)
        if isinstance(chosen, ToConvert):
            owner, inner, name = chosen.layer, "weight", key.removesuffix(".weight")
        else:
            owner, inner, name = chosen.parameter.owner, chosen.parameter.key, key
        dense_class = type(owner)
        owner._parameters[inner] = nn.Parameter(weight, requires_grad=False)
        try:
            layers = _convert(name, chosen)
            if isinstance(place, DTensor) and isinstance(owner, QLoRALinear):
                split(owner, place.device_mesh, by_inputs=place.placements[0].is_shard(1))
        except ValueError as error:
            owner.__class__, owner._parameters[inner] = dense_class, place
            return self.failed(source, key, part, f"{name}: {error}")
        return self.quantized(layers, key, missing_keys)


LOAD_WHOLE = (
    "a DistributedConfig can distribute a model in 4 bits by tensor parallelism alone, and from files in 16 or 32 bit. "
    "Load it without one, and call parallelize_module and fully_shard in configure_model."
)


def _not_splittable(place: DTensor, chosen: ToConvert | StackToConvert) -> str | None:
    """Why a parameter that a plan of transformers distributes can't be in 4 bits; None if it can."""
    if isinstance(chosen, StackToConvert):
        return SPLIT_EXPERTS
    if place.device_mesh.ndim > 1:
        return LOAD_WHOLE
    return None if type(place.placements[0]) is Shard else unknown_style("a plan for fused layers")


def _convert(name: str, chosen: ToConvert | StackToConvert) -> dict[str, nn.Module]:
    """Convert a layer or a stack of experts: name -> 4-bit layer."""
    if isinstance(chosen, ToConvert):
        QLoRALinear.from_linear(chosen.layer, chosen.config, name, seed_name=chosen.seed_name)
        return {name: chosen.layer}
    (owner, key, experts, transposed), config, seed_name = chosen
    made = QLoRAExperts.from_parameter(owner, key, config, name, experts, transposed, seed_name=seed_name)
    return {expert_name(name, number): layer for number, layer in enumerate(made.layers)}


class _LoadPacked(_Op):
    """bitsandbytes' entries of one layer -> the parameters of a QLoRALinear, with the same bytes."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: nn.Module,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """See ConversionOps; is also called for each weight that is not in 4 bits."""
        state = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        key, name = full_layer_name, owner_name(full_layer_name)
        layer = model.get_submodule(name)
        place: Tensor = getattr(layer, last_part(key))  # a parameter or a buffer
        if set(state) == {"weight"}:
            return self.dense(key, state["weight"].to(place.dtype))
        if isinstance(place, DTensor):
            return self.failed(key, key, place.to_local(), f"{key}: {LOAD_WHOLE}")
        try:
            weight = PackedWeight.from_bnb_state_dict(state)
        except ValueError as error:
            return self.failed(key, key, place, f"{name}.{error}")
        if weight.shape != (place.shape[::-1] if kind_of(type(layer)).transposed else place.shape):
            return self.mismatch(key, key, weight.shape, place)
        weight = replace(weight, dtype=place.dtype)
        chosen = self.hf_quantizer.chosen.get(key)
        if chosen is not None:
            QLoRALinear.from_packed(layer, weight, type(layer), chosen.config, name, chosen.seed_name)
            return self.quantized({name: layer}, key, missing_keys)
        if is_linear(layer):
            return {key: decode_and_store_original(layer, weight)}
        return {key: weight.dequantize(place.dtype)}
