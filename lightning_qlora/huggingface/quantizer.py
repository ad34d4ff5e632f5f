"""A transformers quantizer that makes 4-bit layers of a model's layers and experts while its weights are read.

One dense weight is in memory at a time, also where transformers joins tensors of the files: of experts, one after
another. A folder in another quantized format is read by transformers' quantizer of that format, whose operations
dequantize each tensor in front of ours.

This file imports transformers, so `quantize_while_loading` imports it only if transformers is installed.
Source of the interface: transformers 5, quantizers/base.py (HfQuantizer) and core_model_loading.py (ConversionOps).
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_qlora.adapters.dequantized_folder import CANNOT_DEQUANTIZE, Dequantize, can_compose, takes_dequantize
from lightning_qlora.adapters.model_folder import ModelFolder
from lightning_qlora.adapters.peft_experts import modules_of
from lightning_qlora.adapters.peft_reader import read_adapter
from lightning_qlora.adapters.save_load import config_of_adapter
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.files.safetensors_folder import WEIGHTS, WeightFolder, read_header
from lightning_qlora.huggingface.gguf_tensors import unread_tensors
from lightning_qlora.huggingface.load_weights import read_weights
from lightning_qlora.huggingface.load_without_data import find_without_data, mark_as_found
from lightning_qlora.huggingface.patches import (
    forget_quantizer,
    request_dequantizing,
    unwrap_operations,
    wrap_operations,
)
from lightning_qlora.layers.dense_reasons import LOADED
from lightning_qlora.layers.dotted_names import expert_name, last_part, owner_name
from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.experts import QLoRAExperts
from lightning_qlora.layers.kinds import decode_and_store_original, is_linear, kind_of
from lightning_qlora.layers.names import named, named_tensors
from lightning_qlora.layers.qlora_linear import QLoRALinear, check_packed_initialization
from lightning_qlora.layers.selection import StackToConvert, ToConvert, select_in_part
from lightning_qlora.layers.tensor_parallel import SPLIT_EXPERTS, split, unknown_style
from lightning_qlora.quantization.codebooks import OF_BITSANDBYTES
from lightning_qlora.quantization.packed_weight import PackedWeight

COMPOSES = can_compose()
SHARD = re.compile(r"model-\d+-of-\d+")  # name of one of several files of weights
STORED = [  # the entries of bitsandbytes for a weight
    "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax",
    *(f"weight.quant_state.bitsandbytes__{kind}" for kind in OF_BITSANDBYTES), "weight",
]  # fmt: skip


class Quantizers:
    """Makes the quantizers of the models that are loaded within one `quantize_while_loading`."""

    def __init__(self, config: QLoRAConfig, sharding: bool = False) -> None:
        self.config, self.sharding = config, sharding
        self.on_meta: list[tuple[nn.Module, ModelFolder]] = []  # models that wait for `fully_shard`, and their folders
        # Errors for weights of another shape, of the load that began last, which may `ignore_mismatched_sizes`.
        self.mismatches: list[ValueError] = []
        # The adapter to start from, until the first model that has its layers gets it.
        self.adapter = None if config.adapter is None else read_adapter(config.adapter)

    def quantizer_for(
        self, model_config: Any, device_map: Any, gguf_file: str | None, ask: Callable[[Any], tuple[Any, Any, Any]]
    ) -> tuple[Any, Any, Any]:
        """The quantizer of a model, its config and device_map; `ask` is transformers' function for them.

        A format that transformers can't dequantize while it loads has transformers' quantizer alone.
        """
        text_config = model_config.get_text_config(decoder=True)
        stored = getattr(model_config, "quantization_config", None) or getattr(text_config, "quantization_config", None)
        found: dict[str, Any] = (stored if stored is None or isinstance(stored, dict) else stored.to_dict()) or {}
        if gguf_file is None and (not found or found.get("load_in_4bit")):
            return QLoRAQuantizer(self, in_4_bits=bool(found)), model_config, device_map
        requested = None
        if gguf_file is not None:
            found = {"quant_method": "gguf"}
            requested = import_module("transformers").GgufConfig(dequantize=True) if COMPOSES else None
        elif takes_dequantize(found):
            request_dequantizing(model_config, found)
        why = (
            f"{model_config.name_or_path}: is in {found.get('quant_method')!r}, so its layers would not be converted. "
            f"{CANNOT_DEQUANTIZE}"
        )
        try:
            own, model_config, device_map = ask(requested)
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
        if self.config.adapter is None:
            return self.config
        names = {name for name, _ in model.named_modules()}
        if self.adapter is None or not names.issuperset(modules_of(self.adapter)):
            return None
        adapter, self.adapter = self.adapter, None
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
        self.chosen: dict[str, ToConvert | StackToConvert] = {}  # by the name of the parameter
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
        choice = select_in_part(model, config)
        self.chosen = {f"{name}.weight".lstrip("."): layer for name, layer in choice.convert.items()}
        keys: Any = getattr(model, "all_tied_weights_keys", {})
        for key in (*keys, *keys.values()):  # will be tied when they are loaded
            self.chosen.pop(f"{owner_name(key)}.weight", None)
        for key in self.chosen if self.in_4_bits else ():
            with named(key.removesuffix(".weight")):
                check_packed_initialization(config)
        if COMPOSES or not self.in_4_bits:  # else they are dense in the files, and conversion quantizes them
            self.chosen |= choice.stacks
        if self.file_of and self._is_sharded_next(model, paths):
            self._convert_without_data(model, paths[0].parent)

    def _is_sharded_next(self, model: nn.Module, paths: list[Path]) -> bool:
        """Whether `fully_shard` splits the model before its weights are needed, and they can be read then."""
        plan: Any = getattr(model.config, "distributed_config", None)  # DistributedConfig(fsdp_size=n)
        ranks, tensor_parallel = (getattr(plan, size, None) or 1 for size in ("fsdp_size", "tp_size"))
        is_folder = [path.name for path in paths] == [WEIGHTS] or all(SHARD.fullmatch(path.stem) for path in paths)
        shards_next = self.quantizers.sharding or (ranks > 1 and tensor_parallel == 1)
        can_wait = not self.pre_quantized and not self.quantizers.config.trainable_token_indices  # copies of rows
        return shards_next and can_wait and is_folder

    def _convert_without_data(self, model: nn.Module, folder: Path) -> None:
        """Convert the layers that the files have, on the meta device."""
        self.folder = ModelFolder(folder, copy.deepcopy(model))
        for key, chosen in self.chosen.items():
            entry, of_layer = self.folder.entries.get(key), isinstance(chosen, ToConvert)
            if entry.shape == self.shapes[key] if entry else f"{key}.0" in self.folder.entries:
                for layer in _convert(key.removesuffix(".weight") if of_layer else key, chosen).values():
                    assert isinstance(layer, QLoRALinear)
                    layer.loaded = True

    def load_without_data(self, load: Callable[..., Any], model: nn.Module, load_config: Any) -> Any:
        """What `PreTrainedModel._load_pretrained_model` returns, for a model whose values are read later."""
        assert self.folder is not None
        found = find_without_data(self.folder, load, load_config)
        mark_as_found(model, self.folder)
        for name, shape, expected in found[0].mismatched_keys:
            key = self.folder.key_of.get(name, name)
            self.quantizers.mismatches.append(self.error(key, _wrong_shape(key, shape, expected)))
        return found

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """transformers' conversions of the files, each followed by ours."""
        if not COMPOSES or self.folder is not None:  # its values are read later
            return super().update_weight_conversions(weight_conversions, *model)  # type: ignore
        read_by: Any = super() if self.own is None else self.own
        conversions: list[Any] = read_by.update_weight_conversions(weight_conversions, *model)
        if self.pre_quantized:  # tensors that no conversion of theirs makes; "$": one is found by its pattern
            names = sorted({last_part(key) for key in self.chosen})
            conversions += [WeightConverter(f"{name}$", name, [_Nothing()]) for name in names]
        last = _Quantize(self) if self.pre_quantized else None  # else transformers adds it where we want it
        wrap_operations(conversions, lambda operations: _Compose(self, operations), last)
        return conversions

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        """Raise the first error; without one, remove transformers' marks: conversion does the rest."""
        if self.errors:
            raise self.errors[0]
        for name, tensor in named_tensors(model):  # transformers before 5.23 compares none if there is a quantizer
            if tensor.shape != self.shapes.get(name, tensor.shape):
                known = self.quantizers.mismatches  # these name the files of converted weights too
                raise known[0] if known else self.error(name, _wrong_shape(name, tensor.shape, self.shapes[name]))
        unwrap_operations(model, _Compose)
        if self.own is not None:
            self.own._process_model_after_weight_loading(model)
            self.own.remove_quantization_config(model)
        forget_quantizer(model)
        setattr(model, LOADED, self.in_4_bits)
        if self.folder is not None and any(map(is_sharded, model.parameters())):
            read_weights(model, self.folder)
        elif self.folder is not None:
            self.quantizers.on_meta.append((model, self.folder))
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
        return [load] if self.in_4_bits else []

    def read_header(self, gguf_file: str) -> None:
        """For GGUF files, the three that follow too; see HfQuantizer."""
        self.own.read_header(gguf_file)

    def get_state_dict(self, checkpoint_file: str, model: nn.Module) -> dict[str, Any]:
        """The tensors of a GGUF file, each read when it is converted where that is possible."""
        unread = None if self.own.supported else unread_tensors(checkpoint_file, model, self.own.dtype)
        return self.own.get_state_dict(checkpoint_file, model) if unread is None else unread

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See HfQuantizer."""
        return dtype if self.own is None else self.own.update_dtype(dtype)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """See HfQuantizer."""
        read_by: Any = super() if self.own is None else self.own
        return read_by.get_new_dtype(converter, param, dtype)  # type: ignore[no-any-return]

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
                known = source_patterns[0] in self.hf_quantizer.file_of  # else it is a pattern
                made |= self.quantize(key, weight, source_patterns[0] if known else key, model, missing_keys)
            else:
                made[key] = weight
        return made

    def quantize(
        self, key: str, weight: Tensor, source: str, model: nn.Module, missing_keys: set[str] | None,
        experts: Iterator[Tensor] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The parameters of one layer, or of all experts.

        With `experts`, the weight of each as transformers would stack it, the values of `weight` are not used.
        """
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
            layers = _convert(name, chosen, experts)
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


def _convert(
    name: str, chosen: ToConvert | StackToConvert, experts: Iterator[Tensor] | None = None
) -> dict[str, nn.Module]:
    """Convert a layer or a stack of experts: name -> 4-bit layer."""
    if isinstance(chosen, ToConvert):
        QLoRALinear.from_linear(chosen.layer, chosen.config, name, seed_name=chosen.seed_name)
        return {name: chosen.layer}
    (owner, key, number, transposed), config, seed_name = chosen
    made = QLoRAExperts.from_parameter(
        owner, key, config, name, number, transposed, seed_name=seed_name, weights=experts
    )
    return {expert_name(name, i): layer for i, layer in enumerate(made.layers)}


class _Nothing(ConversionOps):
    """Leaves a tensor as it is in the files."""

    hf_quantizer = None  # upstream looks for this name; such conversions are not kept for saving

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, **_: Any
    ) -> dict[str, Any]:
        """See ConversionOps."""
        (tensor,) = input_dict.values()
        return {full_layer_name: tensor}


class _Compose(ConversionOps):
    """transformers' operations for a parameter; for a stack of experts once for each, which is then quantized."""

    supports_many_to_many = True

    def __init__(self, quantizer: QLoRAQuantizer, operations: list[ConversionOps]) -> None:
        self.quantizer, own = quantizer, quantizer.own
        self.operations: list[Any] = [
            Dequantize(op) if own is not None and getattr(op, "hf_quantizer", None) is own else op for op in operations
        ]
        # upstream looks for this name: an operation with a quantizer gets tensors in the type of the files
        self.hf_quantizer = next((q for op in operations if (q := getattr(op, "hf_quantizer", None))), None)

    def __deepcopy__(self, _: Any) -> "_Compose":
        """Itself: a load copies it for each parameter, and it does not change."""
        return self

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], source_patterns: list[str], full_layer_name: str, **arguments: Any
    ) -> dict[str, Any]:
        """See ConversionOps."""
        arguments |= {"source_patterns": source_patterns, "full_layer_name": full_layer_name}
        try:
            return self._by_expert(input_dict, arguments) or self._run(input_dict, arguments)
        except ValueError as error:
            if self.quantizer.own is None:
                raise
            place = arguments["model"].get_parameter(full_layer_name)
            message = f"{full_layer_name}: {error}"
            return dict(_Quantize(self.quantizer).failed(full_layer_name, full_layer_name, place, message))

    def _by_expert(self, tensors: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any] | None:
        """The 4-bit layers of a stack, each expert dense for itself; None for other parameters and other operations."""
        name, model, missing = (arguments[word] for word in ("full_layer_name", "model", "missing_keys"))
        chosen = self.quantizer.chosen.get(name)
        if not isinstance(chosen, StackToConvert) or not all(map(_keeps_experts_apart, self.operations)):
            return None
        parts = [_of_expert(tensors, i, chosen.parameter.experts) for i in range(chosen.parameter.experts)]
        place = model.get_parameter(name)
        experts = (self._one(part, arguments) for part in parts if part is not None)
        if (first := next(experts, None)) is None or first.shape != (1, *place.shape[1:]):
            return None
        values = (value[0].to(place.dtype) for value in chain([first], experts))
        del first
        return _Quantize(self.quantizer).quantize(name, place, name, model, missing, values)

    def _run(self, tensors: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
        for operation in self.operations:
            tensors = operation.convert(tensors, **arguments)
        return tensors

    def _one(self, tensors: dict[str, Any], arguments: dict[str, Any]) -> Tensor:
        """The one tensor that operations make of others."""
        (value,) = self._run(tensors, arguments).values()
        weight: Tensor = value[0] if isinstance(value, list) else value
        return weight


def _keeps_experts_apart(operation: ConversionOps) -> bool:
    """Whether an operation makes the same of each expert alone: it stacks them, or acts on other dimensions."""
    if isinstance(operation, MergeModulelist):
        return operation.dim == 0
    return 0 not in [getattr(operation, name, None) for name in ("dim", "dim0", "dim1", "stack_dim")]


def _of_expert(tensors: dict[str, Any], number: int, experts: int) -> dict[str, Any] | None:
    """What one expert is made of; None if these are not lists or stacks of that many."""
    found = {}
    for pattern, value in tensors.items():
        parts = value if isinstance(value, list) else [value]
        if len(parts) == experts:
            found[pattern] = [parts[number]]
        elif len(parts) == 1 and parts[0].ndim and len(parts[0]) == experts:
            found[pattern] = [parts[0][number : number + 1]]
        else:
            return None
    return found


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
            stack = isinstance(self.hf_quantizer.chosen.get(key), StackToConvert)
            value = state["weight"].to(place.dtype)
            return {key: value} if stack else self.dense(key, value)
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
