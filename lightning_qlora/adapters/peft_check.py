"""Whether PEFT would load an adapter folder as it is meant: PEFT loads it into a copy of the model without weights.

PEFT turns the targets gate_proj, up_proj and down_proj of many mixtures of experts into their 3-D parameters, and then
has no place for adapters of dense MLPs and of shared experts with these names (peft/utils/transformers_weight_
conversion.py). It adapts those layers if `target_parameters` name their weights.
"""

import copy
import importlib.util
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.adapters.adapter import PREFIX, Adapter
from lightning_qlora.adapters.base_model import target_modules_of
from lightning_qlora.adapters.peft_files import peft_config, peft_tensors
from lightning_qlora.layers.dotted_names import COMPILED, parameter_name
from lightning_qlora.layers.experts import PARAMETERS, QLoRAExperts, experts_of
from lightning_qlora.layers.packed_linear import to_dense
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.layers.trainable_tokens import TrainableTokens, remove_tokens


def as_peft_loads_it(adapter: Adapter, base: nn.Module) -> Adapter:
    """The adapter in the form in which PEFT loads all of it; a warning names what PEFT would lose in any form.

    Without PEFT installed the adapter is returned as it is. Raises as `peft_tensors`.
    """
    tensors = peft_tensors(adapter)
    if importlib.util.find_spec("peft") is None:
        return adapter
    lost, error = lost_keys(adapter, base, tensors)
    layers = frozenset(name for name in adapter.layers if f"{PREFIX}{name}.lora_A.weight" in lost)
    if layers and not error and not adapter.use_dora:
        other = replace(adapter, as_parameters=layers, target_modules=target_modules_of(base, layers))
        lost_then, error_then = lost_keys(other, base, tensors)
        if len(lost_then) < len(lost):
            adapter, lost, error = other, lost_then, error_then
    if lost:
        names = ", ".join(sorted(key.removeprefix(PREFIX) for key in lost)[:3])
        warnings.warn(
            f"PEFT would not load {len(lost)} of the {len(tensors)} tensors of this adapter on a "
            f"{type(base).__name__} ({names}{', ...' if len(lost) > 3 else ''})"
            f"{f', because of this error: {error}' if error else ''}. Merge the adapter, or load the folder with "
            "lightning_qlora (adapter=FOLDER).",
            stacklevel=3,
        )
    elif read := layers_that_are_only_read(base):
        warnings.warn(
            f"PEFT would load the adapters of {len(read)} layers of this {type(base).__name__} ({', '.join(read[:3])}"
            f"{', ...' if len(read) > 3 else ''}), but not use them: the model reads the weights of these layers and "
            "does not call them. Merge the adapter, or load the folder with lightning_qlora (adapter=FOLDER).",
            stacklevel=3,
        )
    return adapter


def layers_that_are_only_read(base: nn.Module) -> list[str]:
    """Names of converted layers whose weight other code multiplied with, or read, and which were not called."""
    experts = experts_of(base)
    return [
        name
        for name, layer in adapted_layers(base).items()
        if type(layer).forward is QLoRALinear.forward and layer not in experts
        if layer.weight_was_called or (layer.weight_was_read and not layer.was_called)
    ]


def lost_keys(adapter: Adapter, base: nn.Module, tensors: dict[str, Tensor]) -> tuple[set[str], str | None]:
    """Keys of an adapter's tensors that PEFT would not load into its model, and the error if PEFT stops with one."""
    import peft

    # Without dropout PEFT says which layers are lost; with it PEFT stops at the parameters that it puts in their place.
    config = peft_config(adapter) | {"lora_dropout": 0.0}
    arguments = {key: value for key, value in config.items() if value is not None and key != "peft_type"}
    empty = {key: torch.empty_like(value, device="meta") for key, value in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model: Any = peft.get_peft_model(_without_weights(base), peft.LoraConfig(**arguments))
            found = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
            lost = {key for key, value in empty.items() if key not in found or found[key].shape != value.shape}
            if not lost:
                result: Any = peft.set_peft_model_state_dict(model, empty)
                lost = {key.replace(".default", "") for key in result.unexpected_keys}
        except Exception as error:  # whatever PEFT raises, loading the folder will raise as well
            return set(tensors), f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return lost, None


def _without_weights(module: nn.Module, made: dict[int, Any] | None = None) -> Any:
    """A copy of a module before conversion, its tensors on the meta device; nothing of the original changes."""
    made = {} if made is None else made
    if id(module) in made:
        return made[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        return nn.Module()  # PEFT adapts nothing inside it
    new: Any = object.__new__(type(module))
    nn.Module.__init__(new)  # no hooks
    kept = (key for key in vars(module) if key not in vars(new) and (key == PARAMETERS or not key.startswith("_qlora")))
    own = {key: vars(module)[key] for key in kept if key not in ("_device_mesh", "_tp_size")}  # PEFT would split it
    new.__dict__.update(own, training=module.training)
    if "config" in own:
        new.__dict__["config"] = copy.copy(own["config"])  # PEFT sets attributes of it
    made[id(module)] = new
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            made[id(tensor)] = nn.Parameter(empty, requires_grad=False) if key in module._parameters else empty
    new._parameters.update({key: made.get(id(value)) for key, value in module._parameters.items()})
    new._buffers.update({key: made.get(id(value)) for key, value in module._buffers.items()})
    new._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    if isinstance(module, QLoRALinear):
        empty = module._as_stored(torch.empty(module._shape, dtype=module.weight_dtype, device="meta"))
        to_dense(new, nn.Parameter(empty, requires_grad=False))
        return new
    for key, part in module._modules.items():
        new._modules[key] = None if part is None else _without_weights(getattr(part, COMPILED, part), made)
    if isinstance(module, TrainableTokens):
        remove_tokens(new)
    for key, part in module._modules.items():
        if isinstance(part, QLoRAExperts):
            stack = torch.empty(part.weight_shape, dtype=part.layers[0].weight_dtype, device="meta")
            new._modules[key].restore(new, parameter_name(key), stack)
    return new
