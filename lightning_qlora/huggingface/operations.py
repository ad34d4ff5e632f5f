"""Operations that turn what transformers reads into 4-bit layers: the path of one weight, from top to bottom.

    Compose       the operations of transformers, of a stack for one expert after another
    Quantize      float weights, and stacks of experts
    LoadPacked    bitsandbytes' entries, which keep their bytes
    Place         where the weight goes: a layer in 4 bits, a dense one, or an error for later

Source of the interface: transformers 5, core_model_loading.py (ConversionOps).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers.core_model_loading import ConversionOps, MergeModulelist

from lightning_qlora.experts.experts import QLoRAExperts
from lightning_qlora.huggingface.model_folder import single_tensor
from lightning_qlora.layers.kinds import decode_as_stored, kind_of
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import last_part, owner_name, stack_name
from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.layers.tensor_parallel import SPLIT_EXPERTS, unknown_style
from lightning_qlora.quantization.packed_weight import PackedWeight
from lightning_qlora.selection.apply import convert_layer
from lightning_qlora.selection.selection import Row
from lightning_qlora.tensors.dtensor import local

LOAD_WHOLE = (
    "a DistributedConfig with tp_size can split a model in 4 bits from files in 16 or 32 bit, without fsdp_size and "
    "trainable_token_indices. Load it without one, and call parallelize_module and fully_shard in configure_model."
)


class Nothing(ConversionOps):
    hf_quantizer = None  # upstream looks for this name; such conversions are not kept for saving

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, **_: Any
    ) -> dict[str, Any]:
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
    def convert(self, input_dict: dict[str, Any], **arguments: Any) -> dict[str, Any]:  # type: ignore[override]
        return self._by_expert(input_dict, arguments) or self._run(input_dict, arguments)

    def _by_expert(self, tensors: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any] | None:
        """The 4-bit layers of a stack, one dense expert at a time; None if it is none or operations mix experts."""
        name, model, missing = (arguments[word] for word in ("full_layer_name", "model", "missing_keys"))
        stack = getattr(self.quantizer.chosen.get(name), "stack", None)
        if stack is None or not all(map(_keeps_experts_apart, self.operations)):
            return None
        parts = [_of_expert(tensors, i, stack.experts) for i in range(stack.experts)]
        place = Place(self.quantizer, model, name, missing)
        experts = (single_tensor(*self._run(part, arguments).values()) for part in parts if part is not None)
        if (first := next(experts, None)) is None or first.shape != (1, *place.empty.shape[1:]):
            return None
        values = (value[0].to(place.empty.dtype) for value in chain([first], experts))
        del first
        return place.quantize(place.empty, values)

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


class _Operation(ConversionOps):
    def __init__(self, quantizer: Any) -> None:
        self.hf_quantizer = quantizer  # upstream looks for this name


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
            if key in self.hf_quantizer.chosen:
                tensors |= Place(self.hf_quantizer, model, key, missing_keys, source_patterns[0]).quantize(weight)
            else:
                tensors[key] = weight
        return tensors


class LoadPacked(_Operation):
    """bitsandbytes' entries of one layer -> the parameters of a QLoRALinear, with the same bytes."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, missing_keys: Any = None, **_: Any
    ) -> dict[str, Any]:
        """See ConversionOps; is also called for each weight that is not in 4 bits."""
        state = {key: single_tensor(value) for key, value in input_dict.items()}
        place = Place(self.hf_quantizer, model, full_layer_name, missing_keys)
        dtype, shape = place.empty.dtype, place.empty.shape
        if set(state) == {"weight"}:
            value = state["weight"].to(dtype)
            if place.chosen is not None and place.chosen.stack is not None:
                return {full_layer_name: value}  # quantized next
            return place.dense(value)
        name = owner_name(full_layer_name)
        try:
            weight = PackedWeight.from_bnb_state_dict(state)
        except ValueError as error:
            return place.refuse(f"{name}.{error}")
        if kind_of(type(place.owner)).transposed:
            shape = shape[::-1]
        if weight.shape != shape:
            return place.refuse_shape(weight.shape)
        weight = replace(weight, dtype=dtype)
        if place.chosen is None:
            return {full_layer_name: decode_as_stored(place.owner, weight)}
        layer: Any = place.owner
        chosen: Any = place.chosen
        QLoRALinear.from_packed(layer, weight, type(layer), chosen.config, name, chosen.seed_name)
        return place.loaded(layer)


class Place:
    """A parameter of the model, or a buffer, for which transformers has read values."""

    def __init__(self, quantizer: Any, model: nn.Module, key: str, missing_keys: Any, source: str = "") -> None:
        self.quantizer = quantizer  # the `QLoRAQuantizer` of the load
        self.key = key
        self.owner = model.get_submodule(owner_name(key))
        self.empty: Tensor = getattr(self.owner, last_part(key))
        self.chosen: Row | None = quantizer.chosen.get(key)  # None: it stays dense
        self._missing_keys: set[str] | None = missing_keys
        self._source = source  # of the files, or a pattern

    def quantize(self, weight: Tensor, experts: Iterator[Tensor] | None = None) -> dict[str, Tensor]:
        """Quantize the weight of a layer or of all experts.

        `experts`: the weight of each expert as transformers would stack it; then the values of `weight` are not used.
        """
        assert self.chosen is not None
        empty = self.empty
        if isinstance(empty, DTensor) and weight.shape == local(empty).shape:
            if message := _not_splittable(empty, self.chosen):
                return self.refuse(f"{self.key}: {message}")
            # Every rank read its part; to quantize, one weight at a time is gathered.
            weight = DTensor.from_local(weight, empty.device_mesh, empty.placements).full_tensor()
        if weight.shape != empty.shape:
            return self.refuse_shape(weight.shape)
        owner, inner = self.owner, self.chosen.key
        try:
            owner._parameters[inner] = nn.Parameter(weight, requires_grad=False)
            layer = convert_layer(self.chosen, weights=experts)
            if isinstance(empty, DTensor) and isinstance(owner, QLoRALinear):
                owner.split_over(empty.device_mesh, by_inputs=empty.placements[0].is_shard(1))
        except ValueError as error:
            return self.refuse(f"{self.chosen.name}: {error}")
        return self.loaded(layer)

    def loaded(self, layer: LoRALayer) -> dict[str, Tensor]:
        """The parameters, by name, of the layer that it became; transformers sets them again."""
        if self._missing_keys is not None:
            self._missing_keys.discard(self.key)
        layer.is_unfinished = True
        bias = layer._parameters.get("bias")
        # The files may lack a bias: then the marks of the single tensors tell transformers what to initialize.
        layer._is_hf_initialized = bias is None  # type: ignore[assignment]
        name = owner_name(self.key)
        if isinstance(layer, QLoRAExperts):
            name = stack_name(self.key)
        parameters = layer.named_parameters(name, recurse=False)
        # Of a distributed parameter, transformers takes the part of this rank.
        return {name: local(p) for name, p in parameters if p is not bias}

    def dense(self, weight: Tensor) -> dict[str, Tensor]:
        self.quantizer.chosen.pop(self.key, None)
        return {self.key: weight}

    def refuse(self, message: str) -> dict[str, Tensor]:
        """Keep an error until all weights are read: transformers would only log what is raised before."""
        return self._refuse(message, self.quantizer.errors, local(self.empty).shape)

    def refuse_shape(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Keep the error for a wrong shape: transformers refuses the load, or initializes the layer."""
        return self._refuse(wrong_shape(self.key, shape, self.empty.shape), self.quantizer.loading.mismatches, shape)

    def _refuse(self, message: str, errors: list[ValueError], shape: tuple[int, ...]) -> dict[str, Tensor]:
        source = self._source
        if source not in self.quantizer.file_of:  # it is a pattern
            source = self.key
        errors.append(self.quantizer.error(source, message))
        return self.dense(torch.zeros((), dtype=self.empty.dtype, device="cpu").expand(shape))  # takes no memory


def _not_splittable(place: DTensor, chosen: Row) -> str | None:
    if chosen.stack is not None:
        return SPLIT_EXPERTS
    if place.device_mesh.ndim > 1:
        return LOAD_WHOLE
    return None if type(place.placements[0]) is Shard else unknown_style("a plan for fused layers")


def wrong_shape(key: str, shape: Sequence[int], expected: Sequence[int]) -> str:
    return (
        f"{key!r} has shape {list(shape)}, and the model has {list(expected)} there. Load it with the config that "
        "belongs to the files, or pass ignore_mismatched_sizes=True to from_pretrained to initialize this layer anew "
        "(transformers 5.23 and newer)."
    )
