"""The state dict of a converted module: what trains, fingerprints of what is frozen, and the conversion's arguments."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qlora.adapters.base_compatibility import check_quantization, record_initialization, required_base
from lightning_qlora.adapters.base_model import alpha_of, alpha_of_layer, describe_base, find_base_model, seed_name_of
from lightning_qlora.adapters.checksums import add_checksums, check_checksums
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.dtensor import is_sharded, like, reshard
from lightning_qlora.layers.fingerprint import fingerprint
from lightning_qlora.layers.lora import ADAPTER
from lightning_qlora.layers.names import plain_name
from lightning_qlora.layers.packed_linear import BASE
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.layers.state_dict import FINGERPRINT, CheckpointMismatchError

CONFIG = "qlora_config"  # key of the conversion's arguments, JSON in a uint8 tensor
BASE_MODEL = "base_model"  # key in that JSON of what `describe_base` returns
DAMAGED = "The checkpoint is damaged: use another copy."
PAGE = 4096  # bytes: the JSON is padded with spaces, because a sharded checkpoint loads into tensors of the same size


class _Known(NamedTuple):
    """A parameter when it was last read."""

    version: int
    dtype: torch.dtype
    shape: torch.Size
    address: int  # `parameter.data = tensor` changes it, but not the version
    fingerprint: int

    @staticmethod
    def read(parameter: Tensor) -> "_Known":
        """Read all of a parameter."""
        return _Known.of(parameter, fingerprint(parameter))

    @staticmethod
    def of(parameter: Tensor, known: int) -> "_Known":
        """The entry of a parameter whose fingerprint is known."""
        address = 0 if is_sharded(parameter) else parameter.data_ptr()
        return _Known(parameter._version, parameter.dtype, parameter.shape, address, known)


class FrozenParameters:
    """Fingerprints of the dense parameters (embeddings, norms) that conversion froze, as they were then."""

    def __init__(self, module: nn.Module) -> None:
        self.known: dict[str, _Known] = {}
        self.has_layers = bool(adapted_layers(module))
        self.replaced = False  # whether the state that is being loaded holds a dense base
        read: dict[int, _Known] = {}  # tied parameters are read once
        for name, parameter in ((plain_name(name), parameter) for name, parameter in _dense_parameters(module)):
            if not parameter.requires_grad:
                if id(parameter) not in read:
                    read[id(parameter)] = _Known.read(parameter)
                self.known[name] = read[id(parameter)]

    def unchanged(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter is still frozen and that of the base; it is read again only if it was written to."""
        known = self.known.get(plain_name(name))
        if known is None or parameter.requires_grad or parameter.shape != known.shape:
            return False
        now = _Known.of(parameter, known.fingerprint)
        moved = now.address != known.address and now.dtype is known.dtype and not is_sharded(parameter)
        if now.version != known.version or moved:
            if fingerprint(parameter) != known.fingerprint:
                return False  # it was replaced, or trained for a while and frozen again
            self.known[plain_name(name)] = now._replace(dtype=known.dtype)
        return True

    def current(self, name: str, parameter: Tensor) -> int:
        """The fingerprint of a parameter as it is now; of one that was cast since, the fingerprint before the cast."""
        known = self.known.get(plain_name(name))
        cast = known is not None and known.dtype is not parameter.dtype and known.shape == parameter.shape
        return known.fingerprint if known is not None and cast else fingerprint(parameter)


def use_adapter_state_dict(root: nn.Module, config: QLoRAConfig) -> None:
    """Make `root.state_dict()` leave out the frozen base, and `load_state_dict` complete it, so that it can be strict.

    Args:
        root: The converted module.
        config: The arguments of its conversion; with checkpoint="full" the base is not left out.
    """
    has_hooks = "_qlora_frozen" in vars(root)  # converted before, and merged, or without a layer for 4 bits
    root._qlora_config = config  # type: ignore[assignment]
    root._qlora_frozen = FrozenParameters(root)  # type: ignore[assignment]
    if has_hooks:
        return
    # Module-level functions: a module with these hooks can be copied and pickled.
    root.register_state_dict_post_hook(_after_state_dict)  # type: ignore[no-untyped-call]
    root.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]
    root.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]


def config_of(state_dict: Mapping[str, Any], prefix: str = "") -> QLoRAConfig | None:
    """The arguments of the conversion in the state dict of a converted module; None if there are none."""
    found = {key: value for key, value in _read_json(state_dict, prefix).items() if key != BASE_MODEL}
    unknown = [key for key in found if key not in QLoRAConfig.__dataclass_fields__]
    if unknown:
        raise ValueError(
            f"{prefix + CONFIG}: has the argument {unknown[0]!r}, which this version of lightning-qlora does not know. "
            "The checkpoint was saved by a newer version: install that version of lightning-qlora."
        )
    try:
        return QLoRAConfig(**found) if found else None
    except (TypeError, ValueError) as error:
        raise type(error)(f"{prefix + CONFIG}: {error}") from error


def base_model_of(state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What `base_model.describe_base` returned for the module of a state dict; empty if it holds nothing of it."""
    about: Any = _read_json(state_dict, prefix).get(BASE_MODEL, {})
    kinds = {"prefix": str, "trained_in_full": list, "lora_alphas": dict, "seed_names": dict, "experts": dict}
    if (
        not isinstance(about, dict)
        or any(not isinstance(about.get(k, kind()), kind) for k, kind in kinds.items())
        or not all(isinstance(name, str) for name in about.get("trained_in_full", []))
    ):
        raise ValueError(f"{prefix + CONFIG}: {BASE_MODEL!r} is {str(about)[:80]!r}. {DAMAGED}")
    check_quantization(about.get("quantization"), f"{prefix + CONFIG}: {BASE_MODEL!r}")
    if "" not in about.get("lora_alphas", {"": 1}):
        raise ValueError(f"{prefix + CONFIG}: the lora_alpha of most layers is missing. {DAMAGED}")
    return about


def _read_json(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    if prefix + CONFIG not in state_dict:
        return {}
    # contiguous() loads the tensors of Lightning's lazily loaded checkpoints.
    try:
        content = json.loads(bytes(state_dict[prefix + CONFIG].contiguous().tolist()))
    except Exception as error:  # a value of another type raises any
        raise ValueError(f"{prefix + CONFIG}: is not valid JSON ({error}). {DAMAGED}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{prefix + CONFIG}: is a JSON {type(content).__name__}, not an object. {DAMAGED}")
    return content


def _after_state_dict(root: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Replace frozen parameters by their fingerprints, and add the arguments of the conversion and checksums."""
    if _is_merged(root):
        return
    config = _config(root)
    if config.checkpoint == "adapter":
        for name, parameter in _dense_parameters(root):
            if prefix + name in state_dict and _frozen(root).unchanged(name, parameter):
                del state_dict[prefix + name]
                known = _frozen(root).known[plain_name(name)].fingerprint
                state_dict[f"{prefix}{name}.{FINGERPRINT}"] = torch.tensor(known, device="cpu")
    # adapter: a folder that is read once, at conversion
    arguments = asdict(config) | {"adapter": None, BASE_MODEL: describe_base(root)}
    text = json.dumps(arguments).encode()
    text = text.ljust(-(-len(text) // PAGE) * PAGE)
    state_dict[prefix + CONFIG] = torch.tensor(list(text), dtype=torch.uint8, device="cpu")
    add_checksums(state_dict, prefix)


def _before_load(root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Check that a state fits the module, and complete it with the frozen parameters of the module."""
    if _is_merged(root):
        return
    reshard(root)
    check_checksums(state_dict, prefix)
    frozen = _frozen(root)
    frozen.replaced = not any(key.endswith("." + FINGERPRINT) for key in state_dict)
    _check_same_layers(root, state_dict, prefix)
    saved, about = config_of(state_dict, prefix), base_model_of(state_dict, prefix)
    state_dict.pop(prefix + CONFIG, None)
    if saved is not None:
        _check_same_function(root, saved, about)
        _keep_initialization(root, saved, about)
    read: dict[int, int] = {}  # tied parameters are read once
    for name, parameter in _dense_parameters(root):
        value = state_dict.pop(f"{prefix}{name}.{FINGERPRINT}", None)
        if value is None:
            continue
        if id(parameter) not in read:
            read[id(parameter)] = frozen.current(name, parameter)
        expected, current = int(value.contiguous()), read[id(parameter)]
        if expected != current:
            raise CheckpointMismatchError(
                f"{name}: the checkpoint was trained on another base model (this frozen parameter has fingerprint "
                f"{expected:x} there, {current:x} here). Load the base model of the training, and do not change its "
                "frozen parameters afterwards."
            )
        state_dict[prefix + name] = parameter.detach()
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if prefix + name in state_dict:  # of a sharded parameter the state holds the whole
            state_dict[prefix + name] = like(state_dict[prefix + name], parameter)


def _after_load(root: nn.Module, _: Any) -> None:
    """After a checkpoint of the dense module its parameters are the base."""
    if _frozen(root).replaced:
        root._qlora_frozen = FrozenParameters(root)  # type: ignore[assignment]


def _check_same_layers(root: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    there = {key[len(prefix) :].rpartition(".")[0] for key in state_dict if key.rpartition(".")[2] == "lora_A"}
    # A shared layer is in a state dict under each of its names.
    here = {name for name, layer in root.named_modules(remove_duplicate=False) if isinstance(layer, QLoRALinear)}
    if there and there != here:
        name = sorted(there ^ here)[0]
        raise CheckpointMismatchError(
            f"{name or 'the module itself'}: {'has' if name in there else 'has no'} adapter in the checkpoint, "
            f"{'has one' if name in here else 'has none'} here ({len(there ^ here)} of {len(there | here)} layers "
            "differ). Convert with the same target_modules, exclude_modules and r as the checkpoint's."
        )


def _check_same_function(root: nn.Module, saved: QLoRAConfig, about: dict[str, Any]) -> None:
    """Refuse arguments that have no effect on shapes, but on what the adapters compute."""
    here = _config(root)
    pairs = {name: (getattr(saved, name), getattr(here, name)) for name in ("use_rslora", "use_dora")}
    for name, full_name, layer in _layers_of_base(root):
        pairs[f"{full_name}: lora_alpha"] = alpha_of(about, name, full_name, saved), alpha_of_layer(layer)
    for name, (there, value) in pairs.items():
        if there != value:
            raise CheckpointMismatchError(
                f"{name} is {there!r} in the checkpoint and {value!r} here: the adapters would compute something else "
                "than in training. Set it (lora_alpha also by alpha_pattern) to the value of the checkpoint."
            )


def _keep_initialization(root: nn.Module, saved: QLoRAConfig, about: dict[str, Any]) -> None:
    """Store in the module how the adapters of a checkpoint were initialized: it decides which base they fit."""
    here, layers, quantization = _config(root), adapted_layers(root).values(), about.get("quantization")
    for name, full_name, layer in _layers_of_base(root):
        layer.seed_name = seed_name_of(about, name, full_name)
    method, loftq_config = saved.init_lora_weights, saved.loftq_config
    if (here.init_lora_weights, here.loftq_config) != (method, loftq_config):
        warnings.warn(
            f"The adapters of the checkpoint were initialized as {method!r}, so init_lora_weights="
            f"{here.init_lora_weights!r} is not used.",
            stacklevel=2,
        )
        root._qlora_config = here.with_initialization(method, loftq_config)  # type: ignore[assignment]
        for layer in layers:
            layer.config = layer.config.with_initialization(method, loftq_config)
    if required_base(quantization):  # the adapters came from a folder, whose initialization the arguments don't name
        for layer in layers:
            record_initialization(layer, quantization)


def _layers_of_base(root: nn.Module) -> list[tuple[str, str, QLoRALinear]]:
    """Name in the base model, name in the module, and layer."""
    prefix, base = find_base_model(root)
    layers = adapted_layers(base).items()
    return [(plain_name(name), f"{prefix}.{name}".strip("."), layer) for name, layer in layers]


def _is_merged(root: nn.Module) -> bool:
    """Whether the adapters were merged, in the root or in a part of it: its state dict is that of a dense module."""
    return _frozen(root).has_layers and not adapted_layers(root)


def _frozen(root: nn.Module) -> FrozenParameters:
    return root._qlora_frozen  # type: ignore[return-value]


def _config(root: nn.Module) -> QLoRAConfig:
    return root._qlora_config  # type: ignore[return-value]


def _dense_parameters(root: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter under each of its names, except those that QLoRALinear saves and checks itself."""
    own = {
        f"{name}.{key}".lstrip(".")
        for name, layer in root.named_modules(remove_duplicate=False)
        if isinstance(layer, QLoRALinear)
        for key in layer._parameters
        if key in (*BASE, *ADAPTER)
    }
    return [(n, p) for n, p in root.named_parameters(remove_duplicate=False) if n not in own]
