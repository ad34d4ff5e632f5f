"""In which type dense modules compute, where it is not the one that they are stored in.

    parameters that train in full           fp32, and the buffers of their module, such as the statistics of BatchNorm
    forward pass of the module that uses them   under autocast(16-bit type), its output cast back
    forward pass and steps of the module that was converted     under the same autocast, its output as it is
    all of a module on a device that is slow in 16 bits         fp32: 16-bit inputs are cast, without autocast
    a module that the user holds in fp32, and that trains       fp32: 16-bit inputs are cast, without that autocast

In 16 bits most steps of an optimizer are lost: a step of AdamW is about a learning rate, and that of 2e-4 is smaller
than half of the last bit of every bf16 value above 0.1. A parameter is what it says everywhere, so code may write to it
in a forward pass. Around the converted module, autocast lets code of other modules use such a parameter too:
`F.linear(h, self.head.weight)` in a training step. A module keeps its class: an object stands in place of its `forward`
(`instance_method.py`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_qlora.config import ComputeDtype
from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.held_types import (
    IN_16_BITS,
    TYPES,
    Casts,
    cast_in_place,
    cast_values,
    hold_tensors,
    in_fp32,
    is_our_autocast,
    own_tensors,
    reason_for_fp32,
    set_types_before,
    type_after,
    types_before,
)
from lightning_qlora.layers.instance_method import InstanceMethod, add, instance_method, remove
from lightning_qlora.layers.packed_linear import PackedLayer
from lightning_qlora.lightning_copies import classes

Decide = Callable[[torch.device, torch.dtype], str | None]  # `reason_for_fp32`, or what all ranks agree on
REASON_OF_FP16 = "compute_dtype='fp16': 4-bit layers multiply in fp16 with sums in fp32"
STEPS = ("training_step", "validation_step", "test_step", "predict_step")
# torch has no product of two types for the first two, also under autocast, and a slow one for the third.
TAKES_FP32 = (nn.Bilinear, nn.EmbeddingBag, nn.RMSNorm)


class ComputeIn(InstanceMethod):
    """The forward pass of a dense module, or a step of a LightningModule, in another type than its parameters have.

    Attributes:
        autocast: The 16-bit type of autocast; None, or one that has not 16 bits: without.
        casts_output: Whether the output is cast to that type.
        in_fp32: Whether it computes in fp32 in place of that, with 16-bit inputs cast.
    """

    autocast: torch.dtype | None = None
    casts_output: bool = False
    in_fp32: bool = False

    def call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The method, in its type."""
        dtype = self.autocast
        if self.in_fp32:
            if _has_16_bits(self.module):  # FSDP cast them
                return original(*args, **kwargs)
            with _without_our_autocast(self.module):
                return original(*in_fp32(args), **in_fp32(kwargs))
        if dtype not in IN_16_BITS:
            return original(*args, **kwargs)
        if isinstance(self.module, TAKES_FP32):
            args = _cast(args, dtype, torch.float32)
            kwargs = _cast(kwargs, dtype, torch.float32)
        unfused = nullcontext() if torch.compiler.is_compiling() else _without_fused_layers()
        with _autocast(self.module, dtype), unfused:
            output = original(*args, **kwargs)
        if self.casts_output:
            return _cast(output, torch.float32, dtype)
        return output


class FollowCasts(InstanceMethod):
    """`_apply` of a dense module that holds values in fp32: a cast of the module casts what it computes in, too."""

    def call(self, original: Callable[..., Any], fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """As in nn.Module."""
        result = original(fn, *args, **kwargs)
        follow_cast(self.module, fn)
        return result


def follow_cast(part: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Cast the types before of what a module holds itself, and those that it computes in, as `nn.Module._apply` did."""
    set_types_before(part, {key: type_after(fn, dtype) for key, dtype in types_before(part).items()})
    for method in _methods(part):
        method.in_fp32 = method.in_fp32 and type_after(fn, torch.float32) is torch.float32
        if method.autocast is not None:
            method.autocast = type_after(fn, method.autocast)


def _has_16_bits(module: nn.Module) -> bool:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return any(tensor is not None and tensor.dtype in IN_16_BITS for tensor in tensors)


def _autocast(module: nn.Module, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast on the device of a module; without the cache of casts, so that each use sees the present value."""
    device = next(module.parameters()).device.type
    if device == "meta":
        return nullcontext()
    return torch.autocast(device, dtype, cache_enabled=False)


def _without_our_autocast(module: nn.Module) -> AbstractContextManager[Any]:
    """Without the autocast of a module around this one; the user's stays."""
    if not is_our_autocast():
        return nullcontext()
    device = next((tensor.device.type for tensor in own_tensors(module).values()), "meta")
    if device == "meta":
        return nullcontext()
    return torch.autocast(device, enabled=False)


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """torch's fused encoder layers take weights of one type; they refuse autocast, but ask for that of CUDA alone."""
    is_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_enabled)


def _cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    """The tensors of one type in another, wherever they stand in a value; losses as they are."""
    return cast_values(value, lambda tensor: tensor.to(after) if tensor.dtype is before and tensor.ndim else tensor)


def train_in_full_precision(module: nn.Module) -> None:
    """Hold the 16-bit parameters that train in full in fp32, in place.

    Two kinds of parameters still train in 16 bits: sharded ones, and those of a ScriptModule.
    """
    trained = [
        (owner, key, parameter)
        for owner in module.modules()
        for key, parameter in owner.named_parameters(recurse=False)
        if parameter.requires_grad and parameter.dtype in IN_16_BITS
    ]
    parents = _parents(module)
    in_16_bits = set[int]()  # tied ones are held in fp32 if all of their modules can
    for owner, _, parameter in trained:
        if is_sharded(parameter) or any(map(_is_script, [owner, *_users(owner, parents)])):
            in_16_bits.add(id(parameter))
    held = [(owner, key, parameter) for owner, key, parameter in trained if id(parameter) not in in_16_bits]
    for owner, _, parameter in held:
        for user in _users(owner, parents):
            compute_in(user, parameter.dtype, casts_output=not isinstance(user, classes(LightningModule)))
    dtypes = [parameter.dtype for _, _, parameter in held]
    buffers = [entry for owner, _, _ in held for entry in _buffers_beside(owner) if entry[2].dtype in IN_16_BITS]
    _hold([*held, *buffers])
    for part in module.modules():  # also those that were converted before
        dtypes += [dtype for key, dtype in types_before(part).items() if own_tensors(part)[key].requires_grad]
    if dtypes and not _is_script(module):
        compute_in(module, dtypes[0])


def _hold(tensors: list[tuple[nn.Module, str, Tensor]]) -> None:
    hold_tensors(tensors)
    for part, _, _ in tensors:
        _let_follow_casts(part)


def _let_follow_casts(part: nn.Module) -> None:
    """A 4-bit layer does so by itself."""
    can_follow = not isinstance(part, PackedLayer) and not _is_script(part)
    if can_follow and instance_method(part, FollowCasts, "_apply") is None:
        add(FollowCasts(part, "_apply"))


def _buffers_beside(owner: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The float buffers of a module that trains in fp32, and those of its parametrizations (spectral_norm)."""
    for part in owner.modules() if isinstance(owner, ParametrizationList) else [owner]:
        for key, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point() and not _is_script(part):
                yield part, key, buffer


def _parents(module: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    parents: dict[nn.Module, list[nn.Module]] = {}
    for parent in module.modules():
        for child in parent.children():
            parents.setdefault(child, []).append(parent)
    return parents


def _users(owner: nn.Module, parents: dict[nn.Module, list[nn.Module]]) -> Iterator[nn.Module]:
    """The modules whose forward passes use the parameters of a module: itself, or the next ones around it."""
    if _has(owner, "forward"):
        yield owner
    for parent in parents.get(owner, []):
        # nn.MultiheadAttention uses the weight of its `out_proj`.
        if not _has(owner, "forward") or isinstance(parent, nn.MultiheadAttention):
            yield from _users(parent, parents)


def _has(part: nn.Module, name: str) -> bool:
    """Whether a module has a method of this name that its class, or other code, wrote; nn.ParameterList has none."""
    inherited = [getattr(kind, name, None) for kind in (nn.Module, *classes(LightningModule))]
    return name in vars(part) or getattr(type(part), name, None) not in inherited


def _is_script(part: nn.Module) -> bool:
    return isinstance(part, torch.jit.ScriptModule)


def _methods(part: nn.Module) -> list[ComputeIn]:
    """The methods of a module that compute in another type."""
    methods = [instance_method(part, ComputeIn, name) for name in ("forward", *STEPS)]
    return [method for method in methods if method is not None]


def _make_methods(part: nn.Module) -> list[ComputeIn]:
    """The same for its forward pass, and the steps of a LightningModule, made where there is none."""
    names = ["forward"]
    if isinstance(part, classes(LightningModule)):
        names += STEPS
    for name in names:
        if _has(part, name) and instance_method(part, ComputeIn, name) is None:
            add(ComputeIn(part, name))
    _let_follow_casts(part)
    return _methods(part)


def compute_in(part: nn.Module, dtype: torch.dtype, casts_output: bool = False) -> None:
    """Let a module compute under autocast; the first type stays, where parameters had several."""
    for method in _make_methods(part):
        if method.autocast not in IN_16_BITS:
            method.autocast = dtype
        method.casts_output = method.casts_output or casts_output


def output_dtype(part: nn.Module, input_dtype: torch.dtype) -> torch.dtype:
    """The type of a layer's output without autocast of the caller, for an input of a type."""
    if isinstance(part, PackedLayer):
        return torch.float32 if part.is_held else input_dtype
    for method in _methods(part):
        if method.in_fp32:
            return torch.float32
        if method.autocast in IN_16_BITS:
            return method.autocast
    return input_dtype


def compute_types(modules: Mapping[str, nn.Module]) -> dict[str, torch.dtype]:
    """Name of each dense module whose `forward` has another in its place -> the type that it computes in."""
    types = {}
    for name, part in modules.items():
        method = instance_method(part, ComputeIn)
        if method is not None and method.in_fp32:
            types[name] = torch.float32
        elif method is not None and method.autocast in IN_16_BITS:
            types[name] = method.autocast
    return types


def hold_assigned(modules: Iterable[nn.Module]) -> None:
    """Hold in fp32 again what `load_state_dict(assign=True)` replaced by values in 16 bits."""
    parts = [(part, vars(part)[TYPES]) for part in modules if TYPES in vars(part)]
    held = [(part, key, own_tensors(part).get(key)) for part, types in parts for key in types]
    hold_tensors([(part, key, value) for part, key, value in held if value is not None and value.dtype in IN_16_BITS])


def undo_full_precision(modules: Iterable[nn.Module]) -> None:
    """Let dense modules compute as their class does, and give buffers their types; parameters do not change."""
    for part in modules:
        tensors = own_tensors(part) if TYPES in vars(part) else {}
        for key, dtype in types_before(part).items():
            if key not in part._parameters:
                cast_in_place(tensors[key], dtype)
        set_types_before(part, {})
        remove(part, ComputeIn)
        remove(part, FollowCasts)


def hold_in_fp32(
    module: nn.Module, compute_dtype: ComputeDtype, device: torch.device | None = None, decide: Decide = reason_for_fp32
) -> list[str]:
    """Hold a module in fp32 where its device should compute in fp32, in place; else give it its 16-bit types.

    Args:
        module: A converted module; what trains in full is in fp32 already.
        compute_dtype: As in `QLoRAConfig`. With "fp16" a module is held on every device, with "bf16" on none.
        device: The device that it will be on; None: where it is.
        decide: Why a device holds a type in fp32; None: it does not.

    Returns:
        The reason for each type that is held in fp32.
    """
    parts = list(module.modules())
    types: list[torch.dtype] = []
    if compute_dtype != "bf16":
        types = [dtype for dtype in IN_16_BITS if any(dtype in _types(part) for part in parts)]
    device = device or _device_of(module)
    if compute_dtype == "fp16":
        reasons: dict[torch.dtype, Any] = dict.fromkeys(types, REASON_OF_FP16)
    else:
        reasons = {dtype: decide(device, dtype) for dtype in types}
    if not all(reasons.values()):
        release(parts)
    slow = [dtype for dtype in types if reasons[dtype]]
    _hold_types(parts, slow)
    _take_16_bit_inputs(parts)
    return [reasons[dtype] for dtype in slow]


def _types(part: nn.Module) -> set[torch.dtype]:
    """The types of what a module holds itself and computes in, before they were held in fp32."""
    before = types_before(part)
    types = {before.get(key, tensor.dtype) for key, tensor in own_tensors(part).items()}
    if isinstance(part, PackedLayer):
        types.add(part.dtype_before)
    return types | {method.autocast for method in _methods(part) if method.autocast is not None}


def _hold_types(parts: list[nn.Module], slow: Collection[torch.dtype]) -> None:
    """Hold the values of these types in fp32, and let the modules compute in it."""
    if not slow:
        return
    tensors = [(part, key, tensor) for part in parts for key, tensor in own_tensors(part).items()]
    _hold([entry for entry in tensors if entry[2].dtype in slow and not is_sharded(entry[2])])
    for part in parts:
        if isinstance(part, PackedLayer):
            if part.dtype_before in slow:
                part.weight_dtype = torch.float32
        elif not _is_script(part) and not _types(part).isdisjoint(slow):
            for method in _make_methods(part):
                method.in_fp32 = True


def _take_16_bit_inputs(parts: list[nn.Module]) -> None:
    """Let layers that the user holds in fp32, and that train, compute in fp32 beside 4-bit layers of 16 bits."""
    if not any(isinstance(part, PackedLayer) and part.weight_dtype in IN_16_BITS for part in parts):
        return
    for part in parts:
        own = own_tensors(part)
        trains = any(tensor.requires_grad for tensor in own.values())
        in_fp32 = TYPES not in vars(part) and all(
            t.dtype is torch.float32 for t in own.values() if t.is_floating_point()
        )
        if trains and in_fp32 and not part._modules and not isinstance(part, PackedLayer) and not _is_script(part):
            for method in _make_methods(part):
                method.in_fp32 = True


def release(modules: list[nn.Module]) -> None:
    """Give what a device holds in fp32 the type of before, in place: all but what trains, and the buffers beside it."""
    trained = [part for part in modules if _trains(part)]
    beside = {id(buffer) for part in trained for _, _, buffer in _buffers_beside(part)}
    casts: Casts = {}
    for part in modules:
        if isinstance(part, PackedLayer):
            part.weight_dtype = part.dtype_before
        tensors = own_tensors(part) if TYPES in vars(part) else {}
        for key, dtype in types_before(part).items():
            if not tensors[key].requires_grad and id(tensors[key]) not in beside:
                cast_in_place(tensors[key], dtype, casts)
        set_types_before(part, types_before(part))
        methods = _methods(part)
        for method in methods:
            method.in_fp32 = False
        if not any(method.autocast in IN_16_BITS for method in methods):
            remove(part, ComputeIn)


def _trains(part: nn.Module) -> bool:
    """Whether a module holds a parameter of its own in fp32 that trains."""
    tensors = own_tensors(part) if TYPES in vars(part) else {}
    return any(tensors[key].requires_grad for key in types_before(part))


def _device_of(module: nn.Module) -> torch.device:
    """The device of a module; of one that is on the meta device, the one that it will be loaded to."""
    for part in module.modules():
        tensors = [part.packed] if isinstance(part, PackedLayer) else own_tensors(part).values()
        device = next((tensor.device for tensor in tensors if not tensor.is_meta), None)
        if device is not None:
            return device
    return torch.accelerator.current_accelerator() or torch.device("cpu")
