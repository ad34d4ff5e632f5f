"""Adapters of experts in PEFT's form: one pair of matrices for all experts of a parameter (`target_parameters`).

    lora_A  [experts * r, in]     the r rows of expert 0, then those of expert 1, ...
    lora_B  [out, r * experts]    the first column of every expert, then the second column of every expert, ...

PEFT wraps the module once for each of its parameters, in the order of registration. The names of the inner wrappers get
a `.base_layer`, so only the model says which parameter an adapter belongs to.
Source: peft/tuners/lora/layer.py (ParamWrapper, get_delta_weight) and peft/tuners/tuners_utils.py (_inject_parameters).
"""

from dataclasses import replace
from typing import NoReturn

from torch import Tensor, nn

from lightning_qlora.adapters.adapter import BASE_LAYER, PREFIX, Adapter, ExpertStack, LayerAdapter, outermost
from lightning_qlora.adapters.peft_config import alpha_of_name, is_target
from lightning_qlora.layers.expert_selection import expert_parameters
from lightning_qlora.layers.experts import PARAMETERS
from lightning_qlora.layers.kinds import is_linear
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.names import owner_name, stack_of, without_wrappers


def stacks_of(base: nn.Module) -> dict[str, ExpertStack]:
    """Name of every expert parameter that was converted -> how PEFT writes its adapters."""
    stacks = {}
    for name, owner in base.named_modules():
        converted = vars(owner).get(PARAMETERS, ())
        keys = [key for key in converted if stack_of(owner, key) is not None]
        for wrappers, key in enumerate(reversed(keys)):
            stack = _stack(owner, key, wrappers)
            assert stack is not None  # it is converted
            stacks[without_wrappers(f"{name}.{key}")] = stack
    return stacks


def stack_adapters(adapter: Adapter, name: str) -> tuple[str, LayerAdapter]:
    """PEFT's name and matrices for the experts of one parameter; ValueError if PEFT has no such adapter."""
    stack = adapter.experts[name]
    layer = adapter.layers[name]
    for has_no_place, reason in (
        (stack.flat, "all experts are one matrix there, which PEFT gives one adapter of rank r"),
        (adapter.use_dora, "PEFT has no DoRA for expert parameters, nor beside them"),
        (adapter.fan_in_fan_out, "PEFT has no expert parameters beside transformers' Conv1D"),
        ("." not in name, "PEFT can't wrap a parameter of the model itself"),
    ):
        if has_no_place:
            raise ValueError(
                f"{name}: the adapters of these experts have no place in a PEFT folder: {reason}. Use a Lightning "
                "checkpoint, or merge the adapters."
            )
    a, b = _in_order(stack, layer.lora_A, layer.lora_B)
    return key_of(name, stack), LayerAdapter(a.flatten(0, 1), b.permute(1, 2, 0).flatten(1), layer.alpha)


def unstack_adapters(adapter: Adapter, name: str, stack: ExpertStack) -> LayerAdapter:
    """The adapter of the experts of a parameter, from PEFT's matrices."""
    stacked = adapter.expert_adapters[key_of(name, stack)]
    alpha = alpha_of_name(adapter.peft_config, name)
    r = stacked.r // stack.number
    a = stacked.lora_A.view(stack.number, r, -1)
    b = stacked.lora_B.view(-1, r, stack.number).permute(2, 0, 1)
    return LayerAdapter(*_in_order(stack, a, b), alpha)


def _in_order(stack: ExpertStack, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    # lora_A and lora_B of all experts, from PEFT's order or to it
    if stack.swapped_by_peft:
        return b.mT, a.mT
    return a, b


def key_of(name: str, stack: ExpertStack) -> str:
    """The key in a folder of the adapters of an expert parameter."""
    return owner_name(name) + BASE_LAYER * stack.wrappers


def assign_parameters(adapter: Adapter, base: nn.Module) -> Adapter:
    """The adapter with every expert adapter assigned to a layer or expert parameter of the base, dense or converted.

    `expert_adapters` of the result is empty. CheckpointMismatchError, with file and key, if it does not fit the model.
    """
    layers = dict(adapter.layers)
    experts = dict(adapter.experts)
    modules = {without_wrappers(name): part for name, part in base.named_modules()}
    for owner in dict.fromkeys(map(outermost, adapter.expert_adapters)):
        keys = [key for key in adapter.expert_adapters if outermost(key) == owner]
        if owner not in modules:
            refuse(adapter, f"{keys[0]}.lora_A.weight", base, "has no such module")
        module = modules[owner]
        order = vars(module).get(PARAMETERS, module._parameters)  # of its class; with the parameters in 4 bits
        names = [key for key in order if is_target(adapter.peft_config, f"{owner}.{key}")]
        matrix = is_linear(module) or (names == ["weight"] and len(_shape(module, "weight")) == 2)
        if keys == [owner] and matrix:
            layers[owner] = adapter.expert_adapters[owner]
            continue
        if {owner + BASE_LAYER * wrappers for wrappers in range(len(names))} != set(keys):
            difference = f"has other parameters there that target_parameters names: {', '.join(names) or 'none'}"
            refuse(adapter, f"{keys[0]}.lora_A.weight", base, difference)
        for wrappers, key in enumerate(reversed(names)):
            name = f"{owner}.{key}"
            stack = _stack(module, key, wrappers)
            if stack is None:
                refuse(adapter, f"{owner}.lora_A.weight", base, f"has no stack of experts in {key!r} there")
            _check_shape(adapter, key_of(name, stack), stack, base, _shape(module, key))
            experts[name] = stack
            layers[name] = unstack_adapters(adapter, name, stack)
    return replace(adapter, layers=layers, experts=experts, expert_adapters={}, as_parameters=frozenset())


def _stack(owner: nn.Module, key: str, wrappers: int) -> ExpertStack | None:
    # PEFT reads [experts, dim1, dim2] as [experts, out, in], except where the module says `is_transposed`.
    is_transposed = bool(getattr(owner, "is_transposed", False))
    flat = len(_shape(owner, key)) == 2
    experts = stack_of(owner, key)
    if experts is not None:
        number, transposed = len(experts), experts._transposed
    else:  # as conversion will see it
        found = [parameter for parameter in expert_parameters(owner) if parameter.key == key]
        if not found:
            return None
        number, transposed = found[0].experts, found[0].transposed
    return ExpertStack(number, wrappers, transposed, transposed != is_transposed, flat)


def _shape(owner: nn.Module, key: str) -> tuple[int, ...]:
    experts = stack_of(owner, key)
    if experts is not None:
        return tuple(experts.weight_shape)
    return tuple(getattr(owner, key).shape)


def _check_shape(adapter: Adapter, key: str, stack: ExpertStack, base: nn.Module, shape: tuple[int, ...]) -> None:
    key_of_a = f"{key}.lora_A.weight"
    if stack.flat:
        refuse(adapter, key_of_a, base, "has all experts in one matrix there, with one adapter for each expert")
    stacked = adapter.expert_adapters[key]
    outputs, inputs = shape[-2:]
    if stack.transposed != stack.swapped_by_peft:
        inputs, outputs = shape[-2:]
    if stacked.r % stack.number or (stacked.lora_B.shape[0], stacked.lora_A.shape[1]) != (outputs, inputs):
        refuse(
            adapter,
            key_of_a,
            base,
            f"has {stack.number} experts of {inputs} inputs and {outputs} outputs there (as PEFT counts them), the "
            f"adapter has lora_A {list(stacked.lora_A.shape)} and lora_B {list(stacked.lora_B.shape)}",
        )


def check_sizes(adapter: Adapter, name: str, base: nn.Module, outputs: int, inputs: int) -> None:
    """Refuse the adapter of a layer if it is for other numbers of outputs and inputs than these of the layer."""
    layer = adapter.layers[name]
    sizes = (layer.lora_B.shape[-2], layer.lora_A.shape[-1])
    if sizes != (outputs, inputs):
        difference = (
            f"has a layer of {inputs} inputs and {outputs} outputs there, the adapter is for {sizes[1]} and {sizes[0]}"
        )
        refuse(adapter, f"{name}.lora_A.weight", base, difference)


def refuse(adapter: Adapter, key: str, base: nn.Module, difference: str) -> NoReturn:
    """Raise the error for an adapter that does not fit a model; `difference` says what the model has."""
    raise CheckpointMismatchError(
        f"{adapter.source}: key '{PREFIX}{key}' does not fit: the {type(base).__name__} {difference}. An adapter fits "
        "the architecture it was trained on, converted with its target_modules (pass adapter=FOLDER to QLoRAPrecision)."
    )
