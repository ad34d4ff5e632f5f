"""In which type the dense rest of a converted module is kept, and computes.

    what trains in full, and the buffers beside it      kept in fp32; computes in the module's 16-bit type, by autocast
    all else on a device that is slow in 16 bits        cast to fp32, once
    all else of fp16 on a GPU with bf16                 cast to bf16, once

In 16 bits most steps of an optimizer are lost: a step of AdamW is about a learning rate, and that of 2e-4 is smaller
than half of the last bit of every bf16 value above 0.1.

Types are a matter of the root. Around the steps of a LightningModule, and a forward pass in Fabric, Lightning enters
autocast (`QLoRAPrecision.forward_context`). In a loop of one's own, and in `generate`, the `forward` of the converted
module and of the modules right in it does (`InType`). In a module that trains in full a forward hook casts the output
back to that type, so that the frozen modules after it get what they got before.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_qlora.config import ComputeDtype
from lightning_qlora.dtypes.instance_method import OfTraining, add, instance_method, remove
from lightning_qlora.layers.packed_layer import PackedLayer
from lightning_qlora.layers.with_adapter import WithAdapter
from lightning_qlora.lightning_copies import classes
from lightning_qlora.tensors.device_types import IN_16_BITS, Held, held_type
from lightning_qlora.tensors.dtensor import is_sharded
from lightning_qlora.tensors.held_types import (
    Casts,
    cast_in_place,
    full_precision_parameters,
    held_in,
    own_tensors,
    set_types_before,
    types_before,
)

Decide = Callable[[torch.device, torch.dtype], Held | None]  # `held_type`, or what all ranks agree on
AUTOCAST = "_qlora_autocast"  # attribute of a converted module: the type of autocast around it
OF_FP16 = Held(torch.float32, "compute_dtype='fp16': 4-bit layers multiply in fp16 with sums in fp32")


class InType(OfTraining):
    """`forward` of a converted module, and of a module right in it: inputs are cast, and autocast is on, as needed.

    Attributes:
        held: The type that the module is kept in, where it is not its own: 16-bit inputs are cast to it.
        autocast: The type that it computes in under autocast.
        layer: A 4-bit layer, which had that type and has another one after `module.float()`.
    """

    held: torch.dtype | None = None
    autocast: torch.dtype | None = None
    layer: PackedLayer | None = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if self.held is not None:
            args = tuple(_cast_16_bits(value, self.held) for value in args)
            kwargs = {key: _cast_16_bits(value, self.held) for key, value in kwargs.items()}
        was_cast = self.layer is not None and self.layer.weight_dtype is not self.autocast
        if self.autocast is None or was_cast:
            return self.original(*args, **kwargs)
        device = next(self.module.parameters()).device.type
        if device == "meta":
            return self.original(*args, **kwargs)
        with torch.autocast(device, self.autocast, cache_enabled=False):  # each use sees the present value
            return self.original(*args, **kwargs)


def _cast_16_bits(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype in IN_16_BITS else value


def cast_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a module that trains in full: under autocast its output is in 16 bits; a loss stays."""
    if type(output) is tuple:
        return tuple(cast_output(module, args, each) for each in output)
    if not isinstance(output, Tensor) or output.dtype is not torch.float32 or not output.ndim:
        return output
    device = output.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return output
    return output.to(torch.get_autocast_dtype(device))


def trains_in_full(part: nn.Module) -> bool:
    """Whether a dense module has a parameter in fp32 that trains."""
    if isinstance(part, WithAdapter):
        return False
    return any(p is not None and p.requires_grad and p.dtype is torch.float32 for p in part._parameters.values())


def autocast_type(root: nn.Module) -> torch.dtype | None:
    """The type in which a converted module of 16 bits computes under autocast; None: nothing trains in full in it."""
    return vars(root).get(AUTOCAST)


def train_in_full_precision(modules: list[nn.Module]) -> None:
    """Hold the 16-bit parameters that train in full, and the buffers beside them, in fp32, in place.

    Sharded ones, and those of a ScriptModule, still train in 16 bits.
    """
    tensors = []
    for owner in modules:
        own = owner.named_parameters(recurse=False)
        trained = [
            (owner, key, p) for key, p in own if p.requires_grad and p.dtype in IN_16_BITS and _can_be_held(owner, p)
        ]
        if trained:
            tensors += [*trained, *_buffers_beside(owner)]
            if _has_forward(owner) and not isinstance(owner, classes(LightningModule)):
                _remove_hook(owner)
                owner.register_forward_hook(cast_output)
    _cast([(*entry, torch.float32) for entry in tensors])


def _can_be_held(owner: nn.Module, tensor: Tensor) -> bool:
    return not is_sharded(tensor) and not isinstance(owner, torch.jit.ScriptModule)


def _has_forward(part: nn.Module) -> bool:
    """Whether a module has a forward pass that its class wrote; nn.ModuleList has none."""
    inherited: list[Any] = [nn.Module, *classes(LightningModule)]
    return type(part).forward not in [kind.forward for kind in inherited]


def _buffers_beside(owner: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The 16-bit buffers of a module that trains in fp32, and those of its parametrizations (spectral_norm)."""
    for part in owner.modules() if isinstance(owner, ParametrizationList) else [owner]:
        for key, buffer in part.named_buffers(recurse=False):
            if buffer.dtype in IN_16_BITS:
                yield part, key, buffer


def _cast(tensors: Sequence[tuple[nn.Module, str, Tensor, torch.dtype]]) -> None:
    """Cast parameters and buffers (owner, key, value, type) in place, and record the types before.

    Values that share memory, as weights tied by `.data` do, share it afterwards.
    """
    before = {id(tensor): types_before(part).get(key, tensor.dtype) for part, key, tensor, _ in tensors}
    casts: Casts = {}
    for part, key, tensor, dtype in tensors:
        set_types_before(part, types_before(part) | {key: before[id(tensor)]})
        if tensor.dtype is not dtype:
            cast_in_place(tensor, dtype, casts)


def hold(
    modules: list[nn.Module],
    compute_dtype: ComputeDtype,
    device: torch.device | None = None,
    decide: Decide = held_type,
) -> list[Held]:
    """Hold a module in the type that its device should compute in, in place; else give it its 16-bit types.

    Args:
        modules: All modules in a converted one; what trains in full is in fp32 already.
        compute_dtype: As in `QLoRAConfig`. With "fp16" a module is held on every device, with "bf16" on none.
        device: The device that it will be on; None: where it is.
        decide: In which type a device holds another one, and why; None: in its own.

    Returns:
        For each type that is held in another one, in which, and the reason.
    """
    held: dict[torch.dtype, Held] = {}
    if compute_dtype != "bf16":
        for dtype in [dtype for dtype in IN_16_BITS if any(dtype in _types(part) for part in modules)]:
            decided = OF_FP16 if compute_dtype == "fp16" else decide(device or _device_of(modules), dtype)
            if decided is not None:
                held[dtype] = decided
    others = {dtype: other.dtype for dtype, other in held.items()}
    _hold_in(others, modules)
    _compute_in_types(others, modules)
    return [*held.values()]


def release(modules: list[nn.Module]) -> None:
    """Give what a device holds the type of before, in place: all but what trains, and the buffers beside it."""
    _hold_in({}, modules)


def _types(part: nn.Module) -> set[torch.dtype]:
    before = types_before(part)
    types = {before.get(key, tensor.dtype) for key, tensor in own_tensors(part).items()}
    return types | {part.dtype_before} if isinstance(part, PackedLayer) else types


def _hold_in(others: dict[torch.dtype, torch.dtype], modules: list[nn.Module]) -> None:
    """Hold all that does not train, of each 16-bit type, in another one; of a type without another one in its own."""
    trained = {each for part in modules if trains_in_full(part) for each in (part, *_parametrizations(part))}
    tensors = []
    for part in modules:
        before = types_before(part)
        for key, tensor in own_tensors(part).items():
            dtype = before.get(key, tensor.dtype)
            stays = key in before and (tensor.requires_grad or part in trained)
            if dtype in IN_16_BITS and not stays and not is_sharded(tensor):
                tensors.append((part, key, tensor, others.get(dtype, dtype)))
        if isinstance(part, PackedLayer):
            part.weight_dtype = others.get(part.dtype_before, part.dtype_before)
    _cast(tensors)


def _parametrizations(part: nn.Module) -> Iterator[nn.Module]:
    return part.modules() if isinstance(part, ParametrizationList) else iter(())


def _compute_in_types(others: dict[torch.dtype, torch.dtype], modules: list[nn.Module]) -> None:
    """Let the converted module, and those right in it, compute in its type where inputs or autocast decide."""
    root = modules[0]
    before = _type_before(modules)
    dtype = None if before is None else others.get(before, before)
    for part in (root, *root.children()):
        trains = dtype in IN_16_BITS and any(map(trains_in_full, part.modules()))
        if trains and any(isinstance(each, nn.MultiheadAttention) for each in part.modules()):
            torch.backends.mha.set_fastpath_enabled(False)  # on a CPU torch's fused encoder does not ask for autocast
        if part is root:
            vars(root)[AUTOCAST] = dtype if trains else None
        if isinstance(part, (WithAdapter, torch.jit.ScriptModule)) or not _has_forward(part):
            continue
        if trains or dtype is not before:
            method = in_type(part)
            method.held = dtype if dtype is not before else None
            method.autocast = dtype if trains else None
            method.layer = next((each for each in modules if isinstance(each, PackedLayer)), None)
        else:
            remove(part, InType)


def _type_before(modules: list[nn.Module]) -> torch.dtype | None:
    """That of the 4-bit layers; without one that of what trains in full."""
    for part in modules:
        if isinstance(part, PackedLayer):
            return part.dtype_before
    return next((dtype for part in modules for _, tensor, dtype in held_in(part) if tensor.requires_grad), None)


def in_type(part: nn.Module) -> InType:
    method = instance_method(part, InType)
    if method is None:
        method = InType(part)
        add(method)
    return method


def _remove_hook(part: nn.Module) -> None:
    for key, hook in [*part._forward_hooks.items()]:
        if hook is cast_output:
            del part._forward_hooks[key]


def undo_full_precision(
    named: Sequence[tuple[str, nn.Module]], cast: Callable[[Tensor, torch.dtype], Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Let dense modules compute as their class does, and give buffers and what trains in fp32 their types before.

    `cast` does so with a parameter. Returns these, each with its values in fp32; other parameters do not change.
    """
    values = []
    for _, parameter, dtype in full_precision_parameters(named):
        values.append((parameter, parameter.data))
        parameter.data = cast(parameter.data, dtype)
    for _, part in named:
        for key, tensor, dtype in held_in(part):
            if key not in part._parameters:
                cast_in_place(tensor, dtype)
        set_types_before(part, {})
        vars(part).pop(AUTOCAST, None)
        remove(part, InType)
        _remove_hook(part)
    return values


def _device_of(modules: Iterable[nn.Module]) -> torch.device:
    """The device of modules; of those that are on the meta device, the one that they will be loaded to."""
    for part in modules:
        tensors = [part.packed] if isinstance(part, PackedLayer) else own_tensors(part).values()
        device = next((tensor.device for tensor in tensors if not tensor.is_meta), None)
        if device is not None:
            return device
    return torch.accelerator.current_accelerator() or torch.device("cpu")
