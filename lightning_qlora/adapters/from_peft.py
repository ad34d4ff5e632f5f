"""The layers that an adapter in PEFT's form has in a model, and the errors if it does not fit."""

from typing import NoReturn

from torch import nn

from lightning_qlora.adapters.adapter import BASE_LAYER, PREFIX, Adapter, State, outermost
from lightning_qlora.adapters.peft_config import ranks_of
from lightning_qlora.adapters.peft_experts import ExpertStack, expert_parameter
from lightning_qlora.layers.experts import PARAMETERS
from lightning_qlora.layers.kinds import is_linear, kind_of
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.names import join
from lightning_qlora.layers.parts import Parts


def from_peft(adapter: Adapter, base: Parts) -> dict[str, State]:
    """Name of a layer, or of a parameter of experts, in a base model -> its tensors in the form of the layer.

    The base is dense or converted. CheckpointMismatchError, with file and key, if it has no such layer, or one of
    other sizes.
    """
    modules = dict(base.named)
    wrappers: dict[str, list[str]] = {}  # name of a module -> keys of its adapters
    for key in adapter.layers:
        wrappers.setdefault(outermost(key) if adapter.target_parameters else key, []).append(key)
    layers: dict[str, State] = {}
    for owner, keys in wrappers.items():
        module = modules.get(owner)
        if module is not None and keys == [owner] and is_linear(module):
            layers[owner] = adapter.layers[owner]
            sizes = (getattr(module, size) for size in kind_of(type(module)).sizes)
            _check_sizes(adapter, owner, base, *sizes)
        elif module is not None and adapter.target_parameters:
            layers |= _experts(adapter, base, owner, module, keys)
        else:
            refuse(adapter, f"{keys[0]}.lora_A.weight", base, "has no such layer")
    return layers


def _check_sizes(adapter: Adapter, name: str, base: Parts, outputs: int, inputs: int) -> None:
    state = adapter.layers[name]
    sizes = len(state["lora_B"]), state["lora_A"].shape[1]
    if sizes != (outputs, inputs):
        difference = f"has a layer of {inputs} inputs and {outputs} outputs there, the adapter is for "
        refuse(adapter, f"{name}.lora_A.weight", base, f"{difference}{sizes[1]} and {sizes[0]}")


def _experts(adapter: Adapter, base: Parts, owner: str, module: nn.Module, keys: list[str]) -> dict[str, State]:
    order = vars(module).get(PARAMETERS, module._parameters)  # of its class; with the parameters in 4 bits
    names = [key for key in order if adapter.is_target(join(owner, key))]
    if {owner + BASE_LAYER * number for number in range(len(names))} != set(keys):
        difference = f"has other parameters there that target_parameters names: {', '.join(names) or 'none'}"
        refuse(adapter, f"{keys[0]}.lora_A.weight", base, difference)
    layers = {}
    for wrappers, key in enumerate(reversed(names)):
        part = expert_parameter(module, key)
        if part is None:
            refuse(adapter, f"{owner}.lora_A.weight", base, f"has no stack of experts in {key!r} there")
        name = join(owner, key)
        stack = ExpertStack.of(part, wrappers)
        _check_stack(adapter, stack.key(name), stack, base, part.shape)
        layers[name] = stack.from_peft(adapter.layers[stack.key(name)])
    return layers


def _check_stack(adapter: Adapter, key: str, stack: ExpertStack, base: Parts, shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    if stack.swapped_by_peft:
        inputs, outputs = shape
    shapes = [list(adapter.layers[key][part].shape) for part in ("lora_A", "lora_B")]
    totals = [stack.number * rank for rank in ranks_of(adapter.config)]
    if shapes not in [[[total, inputs], [outputs, total]] for total in totals]:
        difference = (
            f"has {stack.number} experts of {inputs} inputs and {outputs} outputs there (as PEFT counts them), the "
            f"adapter has lora_A {shapes[0]} and lora_B {shapes[1]}"
        )
        if stack.flat:
            difference = "has all experts in one matrix there, with one adapter for each expert"
        refuse(adapter, f"{key}.lora_A.weight", base, difference)


def refuse(adapter: Adapter, key: str, base: Parts, difference: str) -> NoReturn:
    """Raise the error for an adapter that does not fit a model; `difference` says what the model has."""
    kind = type(base.root).__name__
    raise CheckpointMismatchError(
        f"{adapter.source}: key '{PREFIX}{key}' does not fit: the {kind} {difference}. An adapter fits "
        "the architecture it was trained on, converted with its target_modules (pass adapter=FOLDER to QLoRAPrecision)."
    )
