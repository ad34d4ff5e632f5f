"""Merge adapters into the weights of a module: each QLoRALinear becomes the dense layer it was."""

from collections.abc import Mapping
from typing import TypeVar, get_args

import torch
from torch import Tensor, nn

from lightning_qlora.activations.gradient_checkpointing import disable_gradient_checkpointing
from lightning_qlora.checks import check_choice, check_converted, check_module
from lightning_qlora.config import MergeDtype
from lightning_qlora.dtypes.full_precision import release, undo_full_precision
from lightning_qlora.dtypes.instance_method import METHODS, OfTraining, remove
from lightning_qlora.kernels import ops
from lightning_qlora.kernels.rounding import round_stochastically
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import owner_name
from lightning_qlora.layers.qlora_linear import MERGED_ADAPTER
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.provenance import mark_as_loaded
from lightning_qlora.survey.records import conversion_of, record_merge
from lightning_qlora.tensors.device_types import DTYPES
from lightning_qlora.tensors.dtensor import is_sharded, reshard
from lightning_qlora.tensors.held_types import TYPES

Module = TypeVar("Module", bound=nn.Module)


def merge(module: Module, dtype: MergeDtype = "auto") -> Module:
    """Turn every QLoRALinear into the dense layer it was, with its adapter merged, in place and layer by layer.

    Experts become the parameter that they were, in the same way.

    The new weight is the decoded 4-bit weight plus s B A, on which the adapter was trained. The sum is computed in fp32
    and rounded once, stochastically (`round_stochastically`). Parameters that train in full and were held in fp32 are
    rounded in the same way. Every parameter requires a gradient if it did before conversion.

    Args:
        module: A converted module.
        dtype: Type of the weights. "auto": each layer gets the type that it had before conversion. With another value
            all floating-point parameters of the module get that type.

    Returns:
        The module that was passed; a root that was a QLoRALinear has its former class again.

    Raises:
        ValueError: If the module has no QLoRALinear, an adapter holds NaN or Inf, layers are sharded, or dtype is not
            one of those above.

    Example:
        ```python
        import torch
        from lightning_qlora import convert, merge
        from torch import nn

        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        convert(model, r=4)
        merge(model, dtype="bf16")
        assert type(model[0]) is nn.Linear and model[0].weight.dtype == torch.bfloat16
        ```
    """
    check_choice("dtype", dtype, get_args(MergeDtype))
    check_module("module", module)
    parts = Parts.of(module)
    parts.check_adapters_finite()
    with parts.inference_mode():
        merge_onto(parts, {}, dtype)
    return module


@torch.no_grad()
def merge_onto(parts: Parts, weights: dict[str, Tensor], dtype: MergeDtype) -> None:
    """`merge` with these float weights [out, in], by names in the base model; each is removed from the dict.

    The adapters are finite. After an interrupt the layers so far are dense, and another call goes on.
    """
    module = parts.root
    layers = parts.layers
    is_part = all(conversion_of(part) is None for part in parts.modules)  # of a converted module
    if is_part:  # an earlier call may have merged all layers of a whole one
        check_converted(module, layers)
    reshard(parts.modules)
    float_weights: dict[LoRALayer, Tensor] = {}
    if weights:
        float_weights = {layer: weights.pop(name) for name, layer in parts.base.layers.items() if name in weights}
    for name, layer in layers.items():
        if is_sharded(layer.packed):
            raise ValueError(f"{name}: is sharded, and a shard can't be merged. Save a checkpoint and merge that.")

    modules = dict(parts.named)
    is_changed = any(_is_changed(part) for part in parts.modules)
    if is_changed:
        release(parts.modules)
    parameters = []
    of_rows = [adapter for adapter in parts.adapters.values() if adapter.row_count]
    _mark_adapters(parts, modules)
    for name, layer in layers.items():
        weight_dtype = DTYPES.get(dtype, layer.weight_dtype)  # "auto" is not in DTYPES
        merged = merged_weight(layer, weight_dtype, float_weights.pop(layer, None))
        parameters.append(nn.Parameter(merged, requires_grad=False))
        layer.become_dense(parameters[-1], name, modules)
    if is_changed:
        for part in parts.modules:
            remove(part, OfTraining)
        disable_gradient_checkpointing(parts.modules)
        undo_full_precision(parts.named, lambda x, before: round_stochastically(x, DTYPES.get(dtype, before)))
    for adapter in of_rows:
        adapter.end(parts.modules)
    record_merge(parts.modules)
    if dtype != "auto":
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(DTYPES[dtype])
    if parts.models:
        mark_as_loaded(module, parameters)


def _is_changed(part: nn.Module) -> bool:
    """Whether conversion may have changed how a module computes, or in which types."""
    if isinstance(part, LoRALayer) and part.is_held:
        return True
    return not {METHODS, TYPES}.isdisjoint(vars(part)) or bool(vars(part).get("_forward_pre_hooks"))


def _mark_adapters(parts: Parts, modules: Mapping[str, nn.Module]) -> None:
    """Let an optimizer that holds these adapters find those of a later conversion."""
    for name, adapter in parts.adapters.items():
        holder = modules[name if name in modules else owner_name(name)]  # of a stack, the owner of the parameter
        for key, parameter in adapter.trains_instead().items():
            setattr(parameter, MERGED_ADAPTER, (holder, key))


def merged_weight(layer: LoRALayer, dtype: torch.dtype, weight: Tensor | None) -> Tensor:
    """W + s B A in `dtype` and in the shape of the dense layer.

    W: `weight`, [out, in] or for a stack [experts, out, in]; None: the 4-bit weight, decoded to its type.
    """
    float_weights = None if weight is None else layer.split_matrices(weight)
    merged = []
    for matrix in layer.matrices():
        if float_weights is None:
            dense = ops.dequantize(matrix.weight, layer.weight_dtype)
        else:
            dense = float_weights[matrix.number].contiguous()
        merged.append(round_stochastically(matrix.merged(dense.float(), layer.scaling), dtype))
    return layer.as_dense(merged).contiguous()
