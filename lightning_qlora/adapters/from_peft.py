"""The layers that an adapter in PEFT's form has in a model, and the errors if it does not fit."""

from typing import NoReturn

from torch import nn

from lightning_qlora.adapters.adapter import BASE_LAYER, PREFIX, Adapter, State
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
    layers: dict[str, State] = {}
    for owner, keys in adapter.modules.items():
        module = modules.get(owner)
        if module is not None and keys == [owner] and is_linear(module):
            outputs, inputs = (getattr(module, size) for size in kind_of(type(module)).sizes)
            _check_sizes(adapter, owner, base, "a layer", 1, (outputs, inputs))
            layers[owner] = adapter.layers[owner]
        elif module is not None and adapter.target_parameters:
            layers |= _experts(adapter, base, owner, module)
        else:
            refuse(adapter, f"{keys[0]}.lora_A.weight", base, "has no such layer")
    return layers


def _experts(adapter: Adapter, base: Parts, owner: str, module: nn.Module) -> dict[str, State]:
    keys = adapter.modules[owner]
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
        stack = ExpertStack.of(part, wrappers)
        name = join(owner, key)
        sizes = part.shape[::-1] if stack.swapped_by_peft else part.shape
        what = f"{stack.number} experts"
        if stack.flat:
            what += " (all in one matrix, with one adapter for each expert)"
        _check_sizes(adapter, stack.key(name), base, what, stack.number, sizes)
        layers[name] = stack.from_peft(adapter.layers[stack.key(name)])
    return layers


def _check_sizes(adapter: Adapter, key: str, base: Parts, what: str, matrices: int, sizes: tuple[int, int]) -> None:
    """`sizes`: outputs and inputs of `what`, as PEFT counts them; it has the ranks of all matrices in one."""
    a, b = (list(adapter.layers[key][part].shape) for part in ("lora_A", "lora_B"))
    outputs, inputs = sizes
    if (a[1], b[0]) != (inputs, outputs) or a[0] not in {matrices * rank for rank in ranks_of(adapter.config)}:
        difference = f"has {what} of {inputs} inputs and {outputs} outputs there, the adapter has lora_A {a} and lora_B"
        refuse(adapter, f"{key}.lora_A.weight", base, f"{difference} {b}")


def refuse(adapter: Adapter, key: str, base: Parts, difference: str) -> NoReturn:
    """Raise the error for an adapter that does not fit a model; `difference` says what the model has."""
    kind = type(base.root).__name__
    raise CheckpointMismatchError(
        f"{adapter.source}: key '{PREFIX}{key}' does not fit: the {kind} {difference}. An adapter fits "
        "the architecture it was trained on, converted with its target_modules (pass adapter=FOLDER to QLoRAPrecision)."
    )
