"""Adapters of experts in PEFT's form: one pair of matrices for all experts of a parameter (`target_parameters`).

    lora_A  [experts * r, in]     the r rows of expert 0, then those of expert 1, ...
    lora_B  [out, r * experts]    the first column of every expert, then the second column of every expert, ...

PEFT wraps the module once for each of its parameters, in the order of registration. The names of the inner wrappers get
a `.base_layer`, so only the model says which parameter an adapter belongs to.
Source: peft/tuners/lora/layer.py (ParamWrapper, get_delta_weight) and peft/tuners/tuners_utils.py (_inject_parameters).
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from lightning_qlora.adapters.adapter import BASE_LAYER, MAGNITUDE, PREFIX, Adapter, State, outermost
from lightning_qlora.adapters.peft_config import is_target, ranks_of
from lightning_qlora.layers.expert_selection import expert_parameters
from lightning_qlora.layers.experts import PARAMETERS
from lightning_qlora.layers.kinds import is_linear
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.names import join, last_part, owner_name, stack_of, without_wrappers
from lightning_qlora.layers.qlora_linear import base_layers

# Beside stacks of experts PEFT applies these targets to the stacks, and not to dense MLPs and shared experts with these
# names (peft/utils/transformers_weight_conversion.py), unless target_parameters name them.
TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


class ExpertStack(NamedTuple):
    """The experts of one parameter, and how PEFT writes their adapters; checkpoints hold it."""

    number: int  # of experts
    wrappers: int  # how many of PEFT's wrappers are around the one of this parameter
    transposed: bool  # the parameter is [experts, in, out]
    swapped_by_peft: bool  # PEFT takes its inputs for outputs, so PEFT's lora_A is lora_B^T, and the reverse
    flat: bool  # the parameter is [experts * out, in]

    def to_peft(self, state: State) -> State:
        """PEFT's matrices for lora_A [experts, r, in] and lora_B [experts, out, r]."""
        a, b = self._in_order(state["lora_A"], state["lora_B"])
        stacked = {"lora_A": a.flatten(0, 1), "lora_B": b.permute(1, 2, 0).flatten(1)}
        if MAGNITUDE in state:
            stacked[MAGNITUDE] = state[MAGNITUDE].flatten()
        return stacked

    def from_peft(self, stacked: State) -> State:
        """The reverse."""
        a = stacked["lora_A"].view(self.number, -1, stacked["lora_A"].shape[1])
        b = stacked["lora_B"].view(len(stacked["lora_B"]), -1, self.number).permute(2, 0, 1)
        state = dict(zip(("lora_A", "lora_B"), self._in_order(a, b), strict=True))
        if MAGNITUDE in stacked:
            state[MAGNITUDE] = stacked[MAGNITUDE].view(self.number, -1)
        return state

    def _in_order(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if self.swapped_by_peft:
            return b.mT, a.mT
        return a, b


def key_of(name: str, stack: ExpertStack) -> str:
    """PEFT's name of the adapters of an expert parameter."""
    return owner_name(name) + BASE_LAYER * stack.wrappers


def stacks_of(base: nn.Module) -> dict[str, ExpertStack]:
    """Name of every expert parameter that was converted -> how PEFT writes its adapters."""
    stacks = {}
    for name, owner in base.named_modules():
        converted = vars(owner).get(PARAMETERS, ())
        keys = [key for key in converted if stack_of(owner, key) is not None]
        for wrappers, key in enumerate(reversed(keys)):
            stack = stack_at(owner, key, wrappers)
            assert stack is not None  # it is converted
            stacks[without_wrappers(f"{name}.{key}")] = stack
    return stacks


def without_place(stacks: Mapping[str, ExpertStack], config: Mapping[str, Any]) -> str:
    """Why PEFT has no adapter for some of these experts, in an adapter with this config; "" if it has."""
    for name, stack in stacks.items():
        for has_no_place, reason in (
            (stack.flat, "all experts are one matrix there, which PEFT gives one adapter of rank r"),
            (config["use_dora"], "PEFT has no DoRA for expert parameters, nor beside them"),
            (config["fan_in_fan_out"], "PEFT has no expert parameters beside transformers' Conv1D"),
            ("." not in name, "PEFT can't wrap a parameter of the model itself"),
        ):
            if has_no_place:
                return (
                    f"{name}: the adapters of these experts have no place in a PEFT folder: {reason}. Use a Lightning "
                    "checkpoint, or merge the adapters."
                )
    return ""


def linear_parameters(base: nn.Module) -> list[str]:
    """Names of converted linear layers that PEFT adapts as `target_parameters`: it takes their names for experts.

    With DoRA, which PEFT does not have for parameters, there are none, with a warning.
    """
    layers = base_layers(base)
    names = [name for name, layer in layers.items() if last_part(name) in TAKEN_FOR_EXPERTS and not layer.is_stack]
    parameters = [*(name for name, _ in base.named_parameters()), *layers]
    if not names or not any(name.endswith("experts.gate_up_proj") for name in parameters):
        return []
    if any(layer.config.use_dora for layer in layers.values()):
        warnings.warn(
            f"PEFT can't load the adapters of {len(names)} layers ({names[0]}, ...): it takes their names for those of "
            "the experts, and has no DoRA for these. Merge the adapter, or load the folder with lightning_qlora "
            "(adapter=FOLDER).",
            stacklevel=4,
        )
        return []
    return names


def layers_of_adapter(adapter: Adapter, base: nn.Module) -> dict[str, State]:
    """Name of a layer, or of a parameter of experts, in a base model -> its tensors in the form of the layer.

    The base is dense or converted. CheckpointMismatchError, with file and key, if it has no such experts.
    """
    if not adapter.config.get("target_parameters"):
        return adapter.layers
    layers: dict[str, State] = {}
    modules = {without_wrappers(name): part for name, part in base.named_modules()}
    for owner in dict.fromkeys(map(outermost, adapter.layers)):
        keys = [key for key in adapter.layers if outermost(key) == owner]
        if owner not in modules:
            refuse(adapter, f"{keys[0]}.lora_A.weight", base, "has no such module")
        module = modules[owner]
        order = vars(module).get(PARAMETERS, module._parameters)  # of its class; with the parameters in 4 bits
        names = [key for key in order if is_target(adapter.config, join(owner, key))]
        matrix = is_linear(module) or (names == ["weight"] and len(_shape(module, "weight")) == 2)
        if keys == [owner] and matrix:
            layers[owner] = adapter.layers[owner]
            continue
        if {owner + BASE_LAYER * wrappers for wrappers in range(len(names))} != set(keys):
            difference = f"has other parameters there that target_parameters names: {', '.join(names) or 'none'}"
            refuse(adapter, f"{keys[0]}.lora_A.weight", base, difference)
        for wrappers, key in enumerate(reversed(names)):
            stack = stack_at(module, key, wrappers)
            if stack is None:
                refuse(adapter, f"{owner}.lora_A.weight", base, f"has no stack of experts in {key!r} there")
            name = join(owner, key)
            _check_stack(adapter, name, stack, base, _shape(module, key))
            layers[name] = stack.from_peft(adapter.layers[key_of(name, stack)])
    return layers


def stack_at(owner: nn.Module, key: str, wrappers: int = 0) -> ExpertStack | None:
    """The experts of a parameter, dense or converted; None if it has none."""
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


def _check_stack(adapter: Adapter, name: str, stack: ExpertStack, base: nn.Module, shape: tuple[int, ...]) -> None:
    stacked = adapter.layers[key_of(name, stack)]
    rows, columns = shape[-2:]
    if stack.flat:
        rows //= stack.number
    if stack.transposed != stack.swapped_by_peft:
        rows, columns = columns, rows
    shapes = [list(stacked[part].shape) for part in ("lora_A", "lora_B")]
    allowed = [stack.number * rank for rank in ranks_of(adapter.config)]
    if shapes not in [[[total, columns], [rows, total]] for total in allowed]:
        difference = (
            f"has {stack.number} experts of {columns} inputs and {rows} outputs there (as PEFT counts them), the "
            f"adapter has lora_A {shapes[0]} and lora_B {shapes[1]}"
        )
        if stack.flat:
            difference = "has all experts in one matrix there, with one adapter for each expert"
        refuse(adapter, f"{key_of(name, stack)}.lora_A.weight", base, difference)


def check_sizes(adapter: Adapter, name: str, state: State, base: nn.Module, outputs: int, inputs: int) -> None:
    """Refuse the adapter of a layer if it is for other numbers of outputs and inputs than these of the layer."""
    sizes = (state["lora_B"].shape[-2], state["lora_A"].shape[-1])
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
