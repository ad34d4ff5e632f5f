"""Adapters of experts in PEFT's form: one pair of matrices for all experts of a parameter (`target_parameters`).

    lora_A  [experts * r, in]     the r rows of expert 0, then those of expert 1, ...
    lora_B  [out, r * experts]    the first column of every expert, then the second column of every expert, ...

PEFT wraps the module once for each of its parameters, in the order of registration. The names of the inner wrappers get
a `.base_layer`, so only the model says which parameter an adapter belongs to.
Source: peft/tuners/lora/layer.py (ParamWrapper, get_delta_weight) and peft/tuners/tuners_utils.py (_inject_parameters).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from lightning_qlora.adapters.adapter import BASE_LAYER, MAGNITUDE, Adapter, State
from lightning_qlora.experts.expert_selection import expert_parameter
from lightning_qlora.experts.experts import PARAMETERS, ExpertParameter
from lightning_qlora.layers.names import join, last_part, owner_name, stack_of
from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.survey.parts import Parts

# Beside stacks of experts PEFT applies these targets to the stacks, and not to dense MLPs and shared experts with these
# names (peft/utils/transformers_weight_conversion.py), unless target_parameters name them.
TAKEN_FOR_EXPERTS = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
ELSEWHERE = "Use a Lightning checkpoint, or merge the adapters."


class ExpertStack(NamedTuple):
    """The experts of one parameter, and how PEFT writes their adapters; checkpoints hold these values."""

    number: int  # of experts
    wrappers: int  # how many of PEFT's wrappers are around the one of this parameter
    transposed: bool  # the parameter is [experts, in, out]
    swapped_by_peft: bool  # PEFT takes its inputs for outputs, so PEFT's lora_A is lora_B^T, and the reverse
    flat: bool  # the parameter is [experts * out, in]

    @classmethod
    def of(cls, part: ExpertParameter, wrappers: int) -> "ExpertStack":
        # PEFT reads [experts, dim1, dim2] as [experts, out, in], except where the module says `is_transposed`.
        swapped = part.transposed != bool(getattr(part.owner, "is_transposed", False))
        if part.layer is not None:
            flat = part.layer.flat
        else:
            flat = part.owner.get_parameter(part.key).ndim == 2
        return cls(part.experts, wrappers, part.transposed, swapped, flat)

    def key(self, name: str) -> str:
        return owner_name(name) + BASE_LAYER * self.wrappers

    def to_peft(self, state: State) -> State:
        """PEFT's matrices for lora_A [experts, r, in] and lora_B [experts, out, r]."""
        a = state["lora_A"]
        b = state["lora_B"]
        if self.swapped_by_peft:
            a, b = b.mT, a.mT
        stacked = {"lora_A": a.flatten(0, 1), "lora_B": b.permute(1, 2, 0).flatten(1)}
        if MAGNITUDE in state:
            stacked[MAGNITUDE] = state[MAGNITUDE].flatten()
        return stacked

    def from_peft(self, stacked: State) -> State:
        """The reverse."""
        a = stacked["lora_A"]
        b = stacked["lora_B"]
        a = a.view(self.number, -1, a.shape[1])
        b = b.view(len(b), -1, self.number).permute(2, 0, 1)
        if self.swapped_by_peft:
            a, b = b.mT, a.mT
        state = {"lora_A": a, "lora_B": b}
        if MAGNITUDE in stacked:
            state[MAGNITUDE] = stacked[MAGNITUDE].view(self.number, -1)
        return state


def stacks_of(modules: Mapping[str, nn.Module]) -> dict[str, ExpertStack]:
    """Name of every expert parameter that was converted -> how PEFT writes its adapters; of modules by name."""
    stacks = {}
    for name, owner in modules.items():
        parts = [expert_parameter(owner, key) for key in vars(owner).get(PARAMETERS, ()) if stack_of(owner, key)]
        for wrappers, part in enumerate(filter(None, reversed(parts))):
            stacks[join(name, part.key)] = ExpertStack.of(part, wrappers)
    return stacks


def experts_without_place(stacks: Mapping[str, ExpertStack], config: Mapping[str, Any]) -> str:
    """Why PEFT has no adapter with this config for some of these experts; "" if it has."""
    for name, stack in stacks.items():
        for has_no_place, reason in (
            (stack.flat, "all experts are one matrix there, which PEFT gives one adapter of rank r"),
            (config["use_dora"], "PEFT has no DoRA for expert parameters, nor beside them"),
            (config["fan_in_fan_out"], "PEFT has no expert parameters beside transformers' Conv1D"),
            ("." not in name, "PEFT can't wrap a parameter of the model itself"),
        ):
            if has_no_place:
                return f"{name}: the adapters of these experts have no place in a PEFT folder: {reason}. {ELSEWHERE}"
    return ""


def taken_for_experts(base: Parts, dora: bool = False) -> list[str]:
    """Names of converted linear layers that PEFT takes for those of experts, and adapts only as `target_parameters`.

    `dora`: those that it cannot adapt, because it has no DoRA for parameters.
    """
    names = [
        name
        for name, layer in base.layers.items()
        if last_part(name) in TAKEN_FOR_EXPERTS
        and isinstance(layer, QLoRALinear)
        and (MAGNITUDE in layer.parameter_names) is dora
    ]
    if not names:
        return []
    parameters = [*(parameter.name for parameter in base.dense_parameters), *base.layers]
    return names if any(name.endswith("experts.gate_up_proj") for name in parameters) else []


def experts_from_peft(adapter: Adapter, base: Parts, owner: str, module: nn.Module) -> dict[str, State]:
    """Name of each parameter of a module that the adapter has -> its tensors in the form of the layer."""
    keys = adapter.modules[owner]
    order = vars(module).get(PARAMETERS, module._parameters)  # of its class; with the parameters in 4 bits
    names = [key for key in order if adapter.is_target(join(owner, key))]
    if {owner + BASE_LAYER * number for number in range(len(names))} != set(keys):
        difference = f"has other parameters there that target_parameters names: {', '.join(names) or 'none'}"
        adapter.refuse(f"{keys[0]}.lora_A.weight", base, difference)
    layers = {}
    for wrappers, key in enumerate(reversed(names)):
        part = expert_parameter(module, key)
        if part is None:
            adapter.refuse(f"{owner}.lora_A.weight", base, f"has no stack of experts in {key!r} there")
        stack = ExpertStack.of(part, wrappers)
        name = join(owner, key)
        sizes = part.shape[::-1] if stack.swapped_by_peft else part.shape
        what = f"{stack.number} experts"
        if stack.flat:
            what += " (all in one matrix, with one adapter for each expert)"
        adapter.check_sizes(stack.key(name), base, what, stack.number, sizes)
        layers[name] = stack.from_peft(adapter.layers[stack.key(name)])
    return layers
