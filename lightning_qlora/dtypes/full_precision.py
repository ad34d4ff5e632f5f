"""In which type dense modules compute, where it is not the one that they are stored in.

    parameters that train in full           fp32, and the buffers of their module, such as the statistics of BatchNorm
    forward pass of the module that uses them   under autocast(16-bit type), its output cast back
    forward pass and steps of the module that was converted     under the same autocast, its output as it is
    forward pass of a model in a LightningModule                the same
    all of a module on a device that is slow in 16 bits         fp32: 16-bit inputs are cast, without autocast
    all of a module of fp16 on a GPU with bf16                  bf16, what trains under autocast
    a module that the user holds in fp32, and that trains       fp32: 16-bit inputs are cast, without that autocast

In 16 bits most steps of an optimizer are lost: a step of AdamW is about a learning rate, and that of 2e-4 is smaller
than half of the last bit of every bf16 value above 0.1. A parameter is what it says everywhere, so code may write to it
in a forward pass. Around the converted module, autocast lets code of other modules use such a parameter too:
`F.linear(h, self.head.weight)` in a training step. A module keeps its class: an object stands in place of its `forward`
(`instance_method.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_qlora.config import ComputeDtype
from lightning_qlora.dtypes import patches
from lightning_qlora.dtypes.attention import attend
from lightning_qlora.dtypes.compute_in import (
    ComputeIn,
    FollowCasts,
    compute_in,
    compute_methods,
    has_method,
    is_script,
    let_follow_casts,
    make_compute_methods,
)
from lightning_qlora.dtypes.instance_method import remove
from lightning_qlora.layers.packed_layer import PackedLayer
from lightning_qlora.lightning_copies import classes
from lightning_qlora.tensors.device_types import IN_16_BITS, Held, held_type, lacks_bf16
from lightning_qlora.tensors.dtensor import is_sharded
from lightning_qlora.tensors.held_types import (
    TYPES,
    Casts,
    cast_in_place,
    full_precision_parameters,
    held_in,
    own_tensors,
    set_types_before,
    types_before,
)

Decide = Callable[[torch.device, torch.dtype], Held | None]  # `held_type`, or what all ranks agree on
OF_FP16 = Held(torch.float32, "compute_dtype='fp16': 4-bit layers multiply in fp16 with sums in fp32")

# Attention uses that of its `out_proj`, an encoder layer those of all its parts in one fused function.
USE_WEIGHTS_OF_PARTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def train_in_full_precision(modules: list[nn.Module]) -> None:
    """Hold the 16-bit parameters that train in full in fp32, in place; of all modules in the first one.

    Two kinds of parameters still train in 16 bits: sharded ones, and those of a ScriptModule.
    """
    trained = [
        (owner, key, parameter)
        for owner in modules
        for key, parameter in owner.named_parameters(recurse=False)
        if parameter.requires_grad and parameter.dtype in IN_16_BITS
    ]
    parents: dict[nn.Module, list[nn.Module]] = {}
    for parent in modules:
        for child in parent.children():
            parents.setdefault(child, []).append(parent)
    in_16_bits = set[int]()  # tied ones are held in fp32 if all of their modules can
    for owner, _, parameter in trained:
        if is_sharded(parameter) or any(map(is_script, [owner, *_users(owner, parents)])):
            in_16_bits.add(id(parameter))
    held = [(owner, key, parameter) for owner, key, parameter in trained if id(parameter) not in in_16_bits]
    for owner, _, parameter in held:
        for user in _users(owner, parents):
            compute_in(user, parameter.dtype, casts_output=not isinstance(user, classes(LightningModule)))
    dtypes = [parameter.dtype for _, _, parameter in held]
    buffers = [entry for owner, _, _ in held for entry in _buffers_beside(owner) if entry[2].dtype in IN_16_BITS]
    _hold([*held, *buffers])
    for part in modules:  # also those that were converted before
        dtypes += [dtype for _, tensor, dtype in held_in(part) if tensor.requires_grad]
    if dtypes:
        for part in _outermost(modules[0], _trains_in_full):
            compute_in(part, dtypes[0])


def _hold(tensors: list[tuple[nn.Module, str, Tensor]], held: torch.dtype = torch.float32) -> None:
    """Hold 16-bit parameters and buffers (owner, key, value) in another type.

    Values that share memory, as weights tied by `.data` do, share it afterwards.
    """
    dtypes = [types_before(part).get(key, tensor.dtype) for part, key, tensor in tensors]  # a tied one is cast once
    casts: Casts = {}
    for (part, key, tensor), dtype in zip(tensors, dtypes, strict=True):
        set_types_before(part, vars(part).get(TYPES, {}) | {key: dtype})
        if tensor.dtype is not held:
            cast_in_place(tensor, held, casts)
        let_follow_casts(part)


def _buffers_beside(owner: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The float buffers of a module that trains in fp32, and those of its parametrizations (spectral_norm)."""
    for part in owner.modules() if isinstance(owner, ParametrizationList) else [owner]:
        for key, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point() and not is_script(part):
                yield part, key, buffer


def _users(owner: nn.Module, parents: dict[nn.Module, list[nn.Module]]) -> Iterator[nn.Module]:
    """The modules whose forward passes use the parameters of a module: itself, or the next ones around it."""
    if has_method(owner, "forward"):
        yield owner
    for parent in parents.get(owner, []):
        if not has_method(owner, "forward") or isinstance(parent, USE_WEIGHTS_OF_PARTS):
            yield from _users(parent, parents)
        elif isinstance(owner, nn.TransformerEncoderLayer):  # in the ModuleList of an nn.TransformerEncoder
            yield from (each for each in parents.get(parent, []) if isinstance(each, nn.TransformerEncoder))


def _outermost(root: nn.Module, counts: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The converted module; of a LightningModule also the modules in it that have a part that counts.

    Code outside of its steps calls these: `lit.model.generate(...)`.
    """
    parts = [root]
    if isinstance(root, classes(LightningModule)):
        parts += [child for child in root.children() if any(map(counts, child.modules()))]
    return [part for part in parts if not is_script(part)]


def _trains_in_full(part: nn.Module) -> bool:
    return any(tensor.requires_grad for _, tensor, _ in held_in(part))


def hold_assigned(modules: Iterable[nn.Module]) -> None:
    """Hold again what `load_state_dict(assign=True)` replaced by values in 16 bits; the modules held some."""
    assigned: dict[torch.dtype, list[tuple[nn.Module, str, Tensor]]] = {torch.float32: [], torch.bfloat16: []}
    for part in modules:
        own = own_tensors(part)
        in_bf16 = any(method.held is torch.bfloat16 for method in compute_methods(part))
        for key in vars(part)[TYPES]:
            value = own.get(key)
            if value is not None and value.dtype in IN_16_BITS:
                held = torch.bfloat16 if in_bf16 and not value.requires_grad else torch.float32
                assigned[held].append((part, key, value))
    for held, tensors in assigned.items():
        _hold(tensors, held)


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
        remove(part, ComputeIn)
        remove(part, FollowCasts)
    return values


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
    types: list[torch.dtype] = []
    if compute_dtype != "bf16":
        types = [dtype for dtype in IN_16_BITS if any(dtype in _types(part) for part in modules)]
    device = device or _device_of(modules)
    held: dict[torch.dtype, Held] = {}
    for dtype in types:
        decided = OF_FP16 if compute_dtype == "fp16" else decide(device, dtype)
        if decided is not None:
            held[dtype] = decided
    if len(held) < len(types):
        release(modules)
    for dtype, (other, _) in held.items():
        _hold_type(modules, dtype, other)
    if held and lacks_bf16(device):
        patches.replace_attention(attend)
    _take_16_bit_inputs(modules)
    return [*held.values()]


def _types(part: nn.Module) -> set[torch.dtype]:
    """The types of what a module holds itself and computes in, before they were held in fp32."""
    before = types_before(part)
    types = {before.get(key, tensor.dtype) for key, tensor in own_tensors(part).items()}
    if isinstance(part, PackedLayer):
        types.add(part.dtype_before)
    if isinstance(part, USE_WEIGHTS_OF_PARTS):
        types.update(*map(_types, part.children()))
    return types | {method.autocast for method in compute_methods(part) if method.autocast is not None}


def _hold_type(parts: list[nn.Module], dtype: torch.dtype, other: torch.dtype) -> None:
    """Hold what has a 16-bit type, or had it and is held in a third one, in another type."""
    tensors = [(part, key, tensor) for part in parts for key, tensor in own_tensors(part).items()]
    _hold([entry for entry in tensors if entry[2].dtype is dtype and not is_sharded(entry[2])], other)
    stays = _in_fp32_everywhere(parts)
    around = set(_outermost(parts[0], lambda part: dtype in _types(part)))  # may read weights of their parts
    casts: Casts = {}
    for part in parts:
        for _, tensor, before in held_in(part):
            if before is dtype and id(tensor) not in stays:
                cast_in_place(tensor, other, casts)
        if isinstance(part, PackedLayer):
            if part.dtype_before is dtype:
                part.weight_dtype = other
        elif not is_script(part) and (part in around or dtype in _types(part)):
            for method in make_compute_methods(part):
                method.held = other


def _in_fp32_everywhere(parts: list[nn.Module]) -> set[int]:
    """The ids of what trains in fp32, and of the buffers beside it."""
    held = [(part, tensor) for part in parts for _, tensor, _ in held_in(part) if tensor.requires_grad]
    buffers = [buffer for part in {part for part, _ in held} for _, _, buffer in _buffers_beside(part)]
    return {id(tensor) for tensor in [*(tensor for _, tensor in held), *buffers]}


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
        if trains and in_fp32 and not part._modules and not isinstance(part, PackedLayer) and not is_script(part):
            for method in make_compute_methods(part):
                method.held = torch.float32


def release(modules: list[nn.Module]) -> None:
    """Give what a device holds the type of before, in place: all but what trains, and the buffers beside it."""
    stays = _in_fp32_everywhere(modules)
    casts: Casts = {}
    for part in modules:
        if isinstance(part, PackedLayer):
            part.weight_dtype = part.dtype_before
        for _, tensor, dtype in held_in(part):
            if id(tensor) not in stays:
                cast_in_place(tensor, dtype, casts)
        set_types_before(part, types_before(part))
        methods = compute_methods(part)
        for method in methods:
            method.held = None
        if not any(method.autocast in IN_16_BITS for method in methods):
            remove(part, ComputeIn)


def _device_of(modules: Iterable[nn.Module]) -> torch.device:
    """The device of modules; of those that are on the meta device, the one that they will be loaded to."""
    for part in modules:
        tensors = [part.packed] if isinstance(part, PackedLayer) else own_tensors(part).values()
        device = next((tensor.device for tensor in tensors if not tensor.is_meta), None)
        if device is not None:
            return device
    return torch.accelerator.current_accelerator() or torch.device("cpu")
