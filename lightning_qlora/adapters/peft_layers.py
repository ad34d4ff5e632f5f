"""The base model in a module (`Parts.base`) and its layers: what files say of them, and the layers in PEFT's form.

Linear layers have the same tensors there; for experts see `peft_experts.py`.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from lightning_qlora.adapters.adapter import Adapter, State
from lightning_qlora.adapters.base_compatibility import (
    Quantization,
    check_one_folder,
    required_base,
    subtract_initial,
)
from lightning_qlora.adapters.peft_config import config_for_peft
from lightning_qlora.adapters.peft_experts import (
    ELSEWHERE,
    TAKEN_FOR_EXPERTS,
    ExpertStack,
    experts_from_peft,
    experts_without_place,
    stacks_of,
    taken_for_experts,
)
from lightning_qlora.config import Base, QLoRAConfig, arguments_that
from lightning_qlora.layers.kinds import is_linear, sizes_of
from lightning_qlora.layers.lora_layer import ADAPTER, LoRALayer
from lightning_qlora.layers.names import last_part, name_endings, without_wrappers
from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.layers.with_adapter import WithAdapter
from lightning_qlora.survey.parts import Parts

OF_LAYER = arguments_that("of_layer")


def describe_base(parts: Parts, config: QLoRAConfig, trained: Iterable[str]) -> dict[str, Any]:
    """Entries of a checkpoint, beside `config`, from which a PEFT folder can be written without the module.

    `trained` are the names in `trained_modules` of the base model.
    """
    base = parts.base
    layers = {part.reported_name(name): part for name, part in base.places if isinstance(part, LoRALayer)}
    first = next(iter(layers.values()), None)
    linear = [layer for layer in layers.values() if isinstance(layer, QLoRALinear)]
    parameters = []
    if not TAKEN_FOR_EXPERTS.isdisjoint(map(last_part, layers)):
        parameters = taken_for_experts(base)
    of_layers = {}
    for name, layer in layers.items():
        values = {key: getattr(layer.config, key) for key in OF_LAYER}
        arguments = {key: value for key, value in values.items() if value != getattr(config, key)}
        if arguments:
            of_layers[name] = arguments
    description: dict[str, Any] = {
        "prefix": without_wrappers(parts.base_name),
        "task_type": _task_type(base.root),
        "base_model": getattr(getattr(base.root, "config", None), "_name_or_path", None),
        "fan_in_fan_out": any(layer._transposed for layer in linear),
        "quantization": None if first is None else Quantization.of(first).entry(),
        "target_modules": target_modules_of(base, without=parameters),
        "trained_in_full": list(trained),
        "layers": of_layers,
    }
    if len(linear) < len(layers):
        description["experts"] = {name: list(stack) for name, stack in stacks_of(dict(base.named)).items()}
    if parameters:
        description["parameters"] = parameters
    if len(base.adapters) > len(base.layers):
        description["tokens"] = base.rows_that_train
    return description


def trained_modules(parts: Parts, whole: Parts) -> dict[str, nn.Module]:
    """Modules by name with a parameter that is no adapter and trains or has changed.

    `whole` is the module around these parts. Its `unchanged` reads all frozen parameters, so it is asked only if some
    are outside of layers. A parameter that trained and was frozen again, and a resized embedding, have changed. A
    shared module has several names; the rows of a tied embedding have one, as in PEFT's files.
    """
    first_names = {name for name, _ in parts.named}
    trained = {}
    for name, part in parts.places:
        if isinstance(part, WithAdapter) and not (part.row_count and name in first_names):
            continue
        for key, value in part._parameters.items():
            if value is None or not value.is_floating_point():
                continue
            if value.requires_grad or (part, key) not in whole.unchanged:
                trained[without_wrappers(name)] = part
    return trained


def _task_type(base: nn.Module) -> str | None:
    """PEFT's task type of a base model; None if it has none, or one whose class would add modules or text inputs."""
    if getattr(base, "main_input_name", "input_ids") != "input_ids":
        return None
    name = type(base).__name__
    has_encoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    if name.endswith("ForConditionalGeneration") and has_encoder:
        return "SEQ_2_SEQ_LM"
    # Multimodal models without an encoder are "ForConditionalGeneration" too.
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "CAUSAL_LM"
    return None


def target_modules_of(base: Parts, without: Collection[str]) -> str | list[str]:
    """PEFT's target_modules for exactly the converted linear layers: last names, full names, or an expression."""
    modules = [name for name, _ in base.named]
    names = [name for name, layer in base.layers.items() if isinstance(layer, QLoRALinear)]
    layers = [name for name in names if name not in without]
    for endings in ({last_part(name) for name in layers}, set(layers)):
        matches = {name for name in modules if not endings.isdisjoint(name_endings(name))}
        if matches == set(layers):
            return sorted(endings)
    return "|".join(re.escape(name) for name in layers)


def to_peft(
    description: Mapping[str, Any],
    configs: Mapping[str, QLoRAConfig],
    layers: Mapping[str, State],
    quantization: Quantization | None,
    base: Base = "quantized",
    **others: Any,
) -> Adapter:
    """An adapter for this base, from `describe_base`, and the arguments and tensors of each layer by its name there.

    `layers` may have the initial values, which are subtracted for base="float". `others` are attributes of the adapter.
    ValueError if a folder has no place for layers with these arguments.
    """
    check_one_folder(configs)
    if base == "float" and required_base(quantization) is not None:
        layers = subtract_initial(layers, others["source"])
        quantization = None
        others |= {"fingerprints": {}, "bases": {}}
    stacks = {name: ExpertStack(*stack) for name, stack in description.get("experts", {}).items()}
    in_peft = {}
    for name, state in layers.items():
        if name in stacks:
            in_peft[stacks[name].key(name)] = stacks[name].to_peft(state)
        else:
            in_peft[name] = {key: state[key] for key in ADAPTER if key in state}
    config = config_for_peft(description, configs, layers)
    no_place = ""
    if "" in layers:
        no_place = f"PEFT can't adapt a layer that is the model itself. {ELSEWHERE}"
    elif stacks:
        no_place = experts_without_place(stacks, config)
    return Adapter(config=config, layers=in_peft, quantization=quantization, no_place=no_place, **others)


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
            adapter.check_sizes(owner, base, "a layer", 1, sizes_of(module))
            layers[owner] = adapter.layers[owner]
        elif module is not None and adapter.target_parameters:
            layers |= experts_from_peft(adapter, base, owner, module)
        else:
            adapter.refuse(f"{keys[0]}.lora_A.weight", base, "has no such layer")
    return layers
