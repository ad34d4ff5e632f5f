"""What a state dict of a converted module holds: what trains, fingerprints of what is frozen, and the arguments."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora import seams
from lightning_qlora.adapters.base_model import describe_base
from lightning_qlora.adapters.kept_start import keep_start
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.fingerprint import fingerprint
from lightning_qlora.linear import QLoRALinear, adapted_layers
from lightning_qlora.linear_state import FINGERPRINT, CheckpointMismatchError
from lightning_qlora.sharded import is_sharded, like, reshard
from lightning_qlora.starts.since_start import belongs_to

CONFIG = "qlora_config"  # key of the conversion's arguments, JSON in a uint8 tensor
BASE_MODEL = "base_model"  # what is said beside them of the model inside the module
PAGE = 4096  # bytes it fills up with spaces: a checkpoint of shards loads tensors of the same size only
SAME = ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora")  # change the function, not a shape


class FrozenParameters:
    """The dense parameters that conversion froze (embeddings, norms), and their fingerprints at that moment."""

    def __init__(self, module: nn.Module) -> None:
        self.known: dict[str, tuple[int, int]] = {}  # name -> version of the tensor, fingerprint
        self.layers = bool(adapted_layers(module))
        self.replaced = False  # whether the load under way brings a dense base of its own
        names: dict[int, str] = {}  # tied parameters are fingerprinted once
        for name, parameter in _dense_parameters(module):
            if not parameter.requires_grad:
                first = names.setdefault(id(parameter), name)
                self.known[name] = self.known[first] if first != name else (parameter._version, fingerprint(parameter))

    def unchanged(self, name: str, parameter: Tensor) -> bool:
        """Whether the parameter is still frozen and still the base's; hashed again only where it was written to."""
        if name not in self.known or parameter.requires_grad:
            return False
        version, known = self.known[name]
        if parameter._version != version:
            if fingerprint(parameter) != known:
                return False  # trained for a while, then frozen again: it is no longer the base's
            self.known[name] = parameter._version, known
        return True


def remember_base(root: nn.Module, config: QLoRAConfig) -> None:
    """From now on `root.state_dict()` leaves out the frozen base, and strict loading fills it in from the module.

    Args:
        root: The converted module.
        config: The arguments of its conversion; with checkpoint="full" the base stays in.
    """
    root._qlora_config = config  # type: ignore[assignment]
    root._qlora_frozen = FrozenParameters(root)  # type: ignore[assignment]
    # Module-level functions: a module with hooks can still be copied and pickled.
    root.register_state_dict_post_hook(_complete)  # type: ignore[no-untyped-call]
    root.register_load_state_dict_pre_hook(_check_and_fill_in)  # type: ignore[no-untyped-call]
    root.register_load_state_dict_post_hook(_take_as_base)  # type: ignore[no-untyped-call]


def config_of(state_dict: Mapping[str, Any], prefix: str = "") -> QLoRAConfig | None:
    """The arguments of the conversion that a state dict was saved under; None if it holds none."""
    if prefix + CONFIG not in state_dict:
        return None
    arguments = json.loads(bytes(state_dict[prefix + CONFIG].tolist()))
    arguments.pop(BASE_MODEL, None)
    return QLoRAConfig(**arguments)


def base_model_of(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What `base_model.describe_base` said of the module that a state dict was saved from; empty if it is not there."""
    found = next((value for key, value in state_dict.items() if key.rpartition(".")[2] == CONFIG), None)
    return {} if found is None else json.loads(bytes(found.tolist())).get(BASE_MODEL, {})


def _complete(root: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    if _is_merged(root):
        return
    if any(is_sharded(parameter) for parameter in root.parameters()):
        seams.let_keys_be_no_attributes()
    config: QLoRAConfig = root._qlora_config  # type: ignore[assignment]
    if config.checkpoint == "adapter":
        _replace_by_fingerprints(root, state_dict, prefix)
    # adapter: a folder that was read once
    arguments = asdict(config) | {"adapter": None, BASE_MODEL: describe_base(root)}
    text = json.dumps(arguments).encode()
    text = text.ljust(-(-len(text) // PAGE) * PAGE)
    state_dict[prefix + CONFIG] = torch.tensor(list(text), dtype=torch.uint8)


def _replace_by_fingerprints(root: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    frozen: FrozenParameters = root._qlora_frozen  # type: ignore[assignment]
    for name, parameter in _dense_parameters(root):
        if prefix + name in state_dict and frozen.unchanged(name, parameter):
            del state_dict[prefix + name]
            state_dict[f"{prefix}{name}.{FINGERPRINT}"] = torch.tensor(frozen.known[name][1])


def _check_and_fill_in(root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if _is_merged(root):
        return
    reshard(root)
    frozen: FrozenParameters = root._qlora_frozen  # type: ignore[assignment]
    frozen.replaced = not any(key.endswith("." + FINGERPRINT) for key in state_dict)
    _check_same_layers(root, state_dict, prefix)
    about = base_model_of({key: value for key, value in state_dict.items() if key == prefix + CONFIG})
    _check_same_function(root, state_dict, prefix)
    _keep_start(root, about.get("quantization"))
    for name, parameter in _dense_parameters(root):
        expected = state_dict.pop(f"{prefix}{name}.{FINGERPRINT}", None)
        if expected is None:
            continue
        known = frozen.known[name][1] if name in frozen.known else fingerprint(parameter)
        if int(expected) != known:
            raise CheckpointMismatchError(
                f"{name}: the checkpoint was trained on another base model (this frozen parameter has fingerprint "
                f"{int(expected):x} there, {known:x} here). Load the base model it was trained with."
            )
        state_dict[prefix + name] = parameter.detach()
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if prefix + name in state_dict:  # the whole of it, where every rank holds a part
            state_dict[prefix + name] = like(state_dict[prefix + name], parameter)


def _check_same_layers(root: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    there = {key[len(prefix) :].rpartition(".")[0] for key in state_dict if key.rpartition(".")[2] == "lora_A"}
    # A layer that several modules share stands in a state dict under each of its names.
    here = {name for name, layer in root.named_modules(remove_duplicate=False) if isinstance(layer, QLoRALinear)}
    if there and there != here:
        name = sorted(there ^ here)[0]
        raise CheckpointMismatchError(
            f"{name or 'the module itself'}: {'has' if name in there else 'has no'} adapter in the checkpoint, "
            f"{'has one' if name in here else 'has none'} here ({len(there ^ here)} of {len(there | here)} layers "
            "differ). Convert with the same target_modules, exclude_modules and r as the checkpoint's."
        )


def _keep_start(root: nn.Module, quantization: dict[str, Any] | None) -> None:
    """Adapters that a folder brought to the run before started where that says, not where the arguments say."""
    if belongs_to(quantization):
        for layer in adapted_layers(root).values():
            keep_start(layer, quantization)


def _check_same_function(root: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    there, here = config_of(state_dict, prefix), root._qlora_config
    state_dict.pop(prefix + CONFIG, None)
    for name in SAME:
        if there is not None and getattr(there, name) != getattr(here, name):
            raise CheckpointMismatchError(
                f"{name} is {getattr(there, name)!r} in the checkpoint and {getattr(here, name)!r} here: the adapters "
                "would be scaled otherwise than they were trained. Set it to the checkpoint's."
            )
    if there is not None:
        _keep_start_of(there, root)


def _keep_start_of(there: QLoRAConfig, root: nn.Module) -> None:
    """What the adapters started from stays what it was: it says which base they belong to."""
    here: QLoRAConfig = root._qlora_config  # type: ignore[assignment]
    if (here.init_lora_weights, here.loftq_config) == (there.init_lora_weights, there.loftq_config):
        return
    warnings.warn(
        f"The checkpoint's adapters started as {there.init_lora_weights!r}, so init_lora_weights="
        f"{here.init_lora_weights!r} is not used.",
        stacklevel=2,
    )
    root._qlora_config = here.with_start(there.init_lora_weights, there.loftq_config)  # type: ignore[assignment]
    for layer in adapted_layers(root).values():
        layer.config = layer.config.with_start(there.init_lora_weights, there.loftq_config)


def _take_as_base(root: nn.Module, _: Any) -> None:
    """After a checkpoint of the dense module, its parameters are the base."""
    frozen: FrozenParameters = root._qlora_frozen  # type: ignore[assignment]
    if frozen.replaced:
        root._qlora_frozen = FrozenParameters(root)  # type: ignore[assignment]


def _is_merged(root: nn.Module) -> bool:
    """Whether the root was merged, or its part with the adapters was: then its state dict is a dense module's."""
    frozen: FrozenParameters = root._qlora_frozen  # type: ignore[assignment]
    return frozen.layers and not adapted_layers(root)


def _dense_parameters(root: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter under every one of its names, except what QLoRALinear keeps and checks itself."""
    own = {
        f"{name}.{key}".lstrip(".")
        for name, layer in root.named_modules(remove_duplicate=False)
        if isinstance(layer, QLoRALinear)
        for key in layer._parameters
        if key != "bias"
    }
    return [(n, p) for n, p in root.named_parameters(remove_duplicate=False) if n not in own]
