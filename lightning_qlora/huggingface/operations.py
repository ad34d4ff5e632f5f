"""Operations that turn what transformers reads into 4-bit layers.

Each gets the `QLoRAQuantizer` of a load, which says what was chosen and collects the errors. Source of the interface:
transformers 5, core_model_loading.py (ConversionOps).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers.core_model_loading import ConversionOps, MergeModulelist

from lightning_qlora.huggingface.model_folder import single_tensor
from lightning_qlora.layers.apply import convert_layer
from lightning_qlora.layers.derived import restore
from lightning_qlora.layers.dtensor import local
from lightning_qlora.layers.kinds import decode_as_stored, kind_of
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import last_part, owner_name, stack_name
from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.layers.selection import Row
from lightning_qlora.layers.tensor_parallel import SPLIT_EXPERTS, split, unknown_style
from lightning_qlora.quantization.codebooks import OF_BITSANDBYTES
from lightning_qlora.quantization.packed_weight import PackedWeight

STORED = [  # the entries of bitsandbytes for a weight
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_map",
    "weight.absmax",
    *(f"weight.quant_state.bitsandbytes__{kind}" for kind in OF_BITSANDBYTES),
    "weight",
]


def wrong_shape(key: str, shape: Sequence[int], expected: Sequence[int]) -> str:
    """The error for a weight of the files whose shape is not that of the model."""
    return (
        f"{key!r} has shape {list(shape)}, and the model has {list(expected)} there. Load it with the config that "
        "belongs to the files, or pass ignore_mismatched_sizes=True to from_pretrained to initialize this layer anew "
        "(transformers 5.23 and newer)."
    )


class _Operation(ConversionOps):
    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer  # upstream looks for this name

    def dense(self, key: str, weight: Tensor) -> dict[str, Tensor]:
        """Let transformers load a weight as usual."""
        self.hf_quantizer.chosen.pop(key, None)
        return {key: weight}

    def refuse(
        self, source: str, key: str, place: Tensor, message: str, shape: tuple[int, ...] | None = None
    ) -> dict[str, Tensor]:
        """Keep an error until all weights are read: transformers would only log what is raised before.

        `shape`: that of the weight, if it is wrong; transformers then refuses the load, or initializes the layer.
        """
        errors = self.hf_quantizer.errors
        if shape is not None:
            errors = self.hf_quantizer.loading.mismatches
        errors.append(self.hf_quantizer.error(source, message))
        empty = torch.zeros((), dtype=place.dtype, device="cpu").expand(shape or place.shape)  # takes no memory
        return self.dense(key, empty)

    @staticmethod
    def quantized(layer: LoRALayer, key: str, missing_keys: set[str] | None) -> dict[str, Tensor]:
        """The parameters, by name, of the layer that the parameter `key` became; transformers sets them again."""
        if missing_keys is not None:
            missing_keys.discard(key)
        layer.loaded = True
        bias = layer._parameters.get("bias")
        # The files may lack a bias: then the marks of the single tensors tell transformers what to initialize.
        layer._is_hf_initialized = bias is None  # type: ignore[assignment]
        name = owner_name(key)
        if layer.is_stack:
            name = stack_name(key)
        parameters = layer.named_parameters(name, recurse=False)
        # Of a distributed parameter, transformers takes the part of this rank.
        return {name: local(p) for name, p in parameters if p is not bias}


class Quantize(_Operation):
    """Float weights, and stacks of experts, -> the parameters of QLoRALinears."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], source_patterns: list[str], model: Any, missing_keys: Any = None, **_: Any
    ) -> dict[str, Any]:
        """See ConversionOps. There are several weights if transformers split a tensor of the files."""
        tensors: dict[str, Any] = {}
        for key, value in input_dict.items():
            weight = single_tensor(value)
            if self.hf_quantizer.param_needs_quantization(model, key):
                source = source_patterns[0]
                if source not in self.hf_quantizer.file_of:  # it is a pattern
                    source = key
                tensors |= self.quantize(key, weight, source, model, missing_keys)
            else:
                tensors[key] = weight
        return tensors

    def quantize(
        self, key: str, weight: Tensor, source: str, model: nn.Module, missing_keys: set[str] | None,
        experts: Iterator[Tensor] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The parameters of one layer, or of all experts.

        `experts`: the weight of each expert as transformers would stack it; then the values of `weight` are not used.
        """
        place = model.get_parameter(key)
        chosen = self.hf_quantizer.chosen[key]
        part = local(place)
        if isinstance(place, DTensor) and weight.shape == part.shape:
            if message := _not_splittable(place, chosen):
                return self.refuse(source, key, part, f"{key}: {message}")
            # Every rank read its part; to quantize, one weight at a time is gathered.
            weight = DTensor.from_local(weight, place.device_mesh, place.placements).full_tensor()
        if weight.shape != place.shape:
            return self.refuse(source, key, place, wrong_shape(key, weight.shape, place.shape), weight.shape)
        owner, inner = chosen.owner, chosen.key
        owner._parameters[inner] = nn.Parameter(weight, requires_grad=False)
        try:
            layer = convert_layer(chosen, weights=experts)
            if isinstance(place, DTensor) and isinstance(owner, QLoRALinear):
                split(owner, place.device_mesh, by_inputs=place.placements[0].is_shard(1))
        except ValueError as error:
            if isinstance(owner, QLoRALinear):  # `split` refused it
                restore(owner, QLoRALinear)
            owner._parameters[inner] = place
            return self.refuse(source, key, part, f"{chosen.name}: {error}")
        return self.quantized(layer, key, missing_keys)


LOAD_WHOLE = (
    "a DistributedConfig with tp_size can split a model in 4 bits from files in 16 or 32 bit, without fsdp_size and "
    "trainable_token_indices. Load it without one, and call parallelize_module and fully_shard in configure_model."
)


def _not_splittable(place: DTensor, chosen: Row) -> str | None:
    """Why a parameter that a plan of transformers distributes can't be in 4 bits; None if it can."""
    if chosen.stack is not None:
        return SPLIT_EXPERTS
    if place.device_mesh.ndim > 1:
        return LOAD_WHOLE
    if type(place.placements[0]) is not Shard:
        return unknown_style("a plan for fused layers")
    return None


class Nothing(ConversionOps):
    """Leaves a tensor as it is in the files."""

    hf_quantizer = None  # upstream looks for this name; such conversions are not kept for saving

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, **_: Any
    ) -> dict[str, Any]:
        """See ConversionOps."""
        (tensor,) = input_dict.values()
        return {full_layer_name: tensor}


class Compose(ConversionOps):
    """transformers' operations for a parameter. For a stack they run expert by expert, and each one is quantized."""

    supports_many_to_many = True

    def __init__(self, quantizer: Any, conversion: Any) -> None:
        self.quantizer = quantizer
        self.conversion = conversion  # of transformers
        self.operations: list[Any] = conversion.operations
        # upstream looks for this name: an operation with a quantizer gets tensors in the type of the files
        self.hf_quantizer = next((q for op in self.operations if (q := getattr(op, "hf_quantizer", None))), None)

    def __deepcopy__(self, _: Any) -> "Compose":
        """Itself: a load copies it for each parameter, and it does not change."""
        return self

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], source_patterns: list[str], full_layer_name: str, **arguments: Any
    ) -> dict[str, Any]:
        """See ConversionOps."""
        arguments |= {"source_patterns": source_patterns, "full_layer_name": full_layer_name}
        return self._by_expert(input_dict, arguments) or self._run(input_dict, arguments)

    def _by_expert(self, tensors: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any] | None:
        """The 4-bit layers of a stack, one dense expert at a time; None if it is none or operations mix experts."""
        name, model, missing = (arguments[word] for word in ("full_layer_name", "model", "missing_keys"))
        stack = getattr(self.quantizer.chosen.get(name), "stack", None)
        if stack is None or not all(map(_keeps_experts_apart, self.operations)):
            return None
        parts = [_of_expert(tensors, i, stack.experts) for i in range(stack.experts)]
        place = model.get_parameter(name)
        experts = (single_tensor(*self._run(part, arguments).values()) for part in parts if part is not None)
        if (first := next(experts, None)) is None or first.shape != (1, *place.shape[1:]):
            return None
        values = (value[0].to(place.dtype) for value in chain([first], experts))
        del first
        return Quantize(self.quantizer).quantize(name, place, name, model, missing, values)

    def _run(self, tensors: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
        for operation in self.operations:
            tensors = operation.convert(tensors, **arguments)
        return tensors


def _keeps_experts_apart(operation: ConversionOps) -> bool:
    """Whether an operation gives the same result for each expert alone: it stacks experts, or uses other dimensions.

    A Transpose with `check_dims` compares the shape with that of the whole parameter.
    """
    if isinstance(operation, MergeModulelist):
        return operation.dim == 0
    dims = [getattr(operation, name, None) for name in ("dim", "dim0", "dim1", "stack_dim")]
    return 0 not in dims and not getattr(operation, "check_dims", False)


def _of_expert(tensors: dict[str, list[Tensor]], number: int, experts: int) -> dict[str, Any] | None:
    """The tensors of one expert; None if `tensors` has something else than lists or stacks of `experts` entries."""
    parts_of = {}
    for pattern, parts in tensors.items():
        if len(parts) == experts:
            parts_of[pattern] = [parts[number]]
        elif len(parts) == 1 and parts[0].ndim and len(parts[0]) == experts:
            parts_of[pattern] = [parts[0][number : number + 1]]
        else:
            return None
    return parts_of


class LoadPacked(_Operation):
    """bitsandbytes' entries of one layer -> the parameters of a QLoRALinear, with the same bytes."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, missing_keys: Any = None, **_: Any
    ) -> dict[str, Any]:
        """See ConversionOps; is also called for each weight that is not in 4 bits."""
        state = {key: single_tensor(value) for key, value in input_dict.items()}
        key = full_layer_name
        name = owner_name(key)
        layer = model.get_submodule(name)
        chosen = self.hf_quantizer.chosen.get(key)
        place: Tensor = getattr(layer, last_part(key))  # a parameter or a buffer
        if set(state) == {"weight"}:
            value = state["weight"].to(place.dtype)
            if chosen is not None and chosen.stack is not None:
                return {key: value}  # quantized next
            return self.dense(key, value)
        try:
            weight = PackedWeight.from_bnb_state_dict(state)
        except ValueError as error:
            return self.refuse(key, key, place, f"{name}.{error}")
        shape = place.shape
        if kind_of(type(layer)).transposed:
            shape = shape[::-1]
        if weight.shape != shape:
            return self.refuse(key, key, place, wrong_shape(key, weight.shape, place.shape), weight.shape)
        weight = replace(weight, dtype=place.dtype)
        if chosen is not None:
            QLoRALinear.from_packed(layer, weight, type(layer), chosen.config, name, chosen.seed_name)
            assert isinstance(layer, QLoRALinear)
            return self.quantized(layer, key, missing_keys)
        return {key: decode_as_stored(layer, weight)}
