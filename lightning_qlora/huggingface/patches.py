"""Changes to transformers' code and objects, each with the upstream file, the reason, and what would remove it."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch
from torch import nn

from lightning_qlora.adapters.save import save_adapter
from lightning_qlora.layers.names import is_transformers_model, last_part
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.survey.provenance import LOADED
from lightning_qlora.tensors.dtensor import is_sharded
from lightning_qlora.upstream_changes import replaces

Choice = tuple[Any, Any, Any]  # HfQuantizer or None, model config, device_map
# `Loading.quantizer_for` in this thread or task.
QUANTIZER_FOR: ContextVar[Callable[..., Choice] | None] = ContextVar("lightning_qlora_quantizer_for", default=None)


@replaces("transformers.modeling_utils:get_hf_quantizer")
def default_quantizer(
    original: Any, config: Any, quantization_config: Any, device_map: Any, *args: Any, **kwargs: Any
) -> Choice:
    """Let `from_pretrained` use the quantizer of `QUANTIZER_FOR` if its caller names none.

    Upstream: transformers/quantizers/auto.py, get_hf_quantizer, as transformers/modeling_utils.py calls it.
    Supported ways tried: `register_quantizer`, whose quantizer is used only if the caller of from_pretrained passes its
    quantization_config, and not for a folder in bitsandbytes' 4 bits.
    Removed by: a context in transformers that sets the quantization_config of the models loaded within it.
    """

    def ask(requested: Any) -> Any:
        return original(config, requested, device_map, *args, **kwargs)

    quantizer_for = QUANTIZER_FOR.get()
    if quantization_config is not None or quantizer_for is None:
        return ask(quantization_config)  # type: ignore[no-any-return]
    return quantizer_for(config, device_map, kwargs.get("gguf_file"), ask)


@replaces("transformers.modeling_utils:kernelize")
def kernels_when_it_has_values(original: Any, model: Any, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
    """Leave a model on the meta device as it is; its next `train()` chooses the kernels of the Hub for its device.

    Upstream: transformers/integrations/hub_kernels.py, kernelize, which from_pretrained calls at its end from 5.25 on.
    It refuses the meta device, on which a model is that is sharded before its values are read.
    Supported ways tried: `use_kernels=False`, which only the caller of from_pretrained can pass.
    Removed by: kernelize leaving a model on the meta device as it is.
    """
    devices = device_map or {"": getattr(model, "_kernels_device", None) or model.device}
    if {torch.device(device).type for device in devices.values() if device != "disk"} == {"meta"}:
        model._use_kernels = True
    elif device_map is None:  # an argument since 5.25
        original(model, *args, **kwargs)
    else:
        original(model, *args, device_map=device_map, **kwargs)


def forget_quantizer(modules: Iterable[nn.Module]) -> None:
    """Remove the marks of quantization that transformers and `QLoRAQuantizer` left on models among these modules.

    They are saved by the conversions of transformers, of which `QLoRAQuantizer` made copies.

    Upstream: transformers/modeling_utils.py (from_pretrained, to, half, save_pretrained) and quantizers/base.py
    (postprocess_model): a model with these marks refuses to move, to be cast and to be saved.
    Removed by: a quantizer in transformers being able to hand over a model that it is done with.
    """
    for part in filter(is_transformers_model, modules):
        for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", LOADED):
            vars(part).pop(name, None)
        for name in ("quantization_config", "_is_quantized"):
            vars(part.config).pop(name, None)
        used = vars(part).get("_weight_conversions")
        if used:
            part._weight_conversions = [each for each in map(_original, used) if not _is_of_a_quantizer(each)]  # type: ignore[assignment]


@replaces("transformers.modeling_utils:PreTrainedModel.save_pretrained")
def save_adapter_instead(original: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Let `save_pretrained` of a converted model write its adapter, as that of a PeftModel does.

    Upstream: transformers/modeling_utils.py, PreTrainedModel.save_pretrained, writes the model's state dict; that of a
    converted model has no base, so `from_pretrained` would initialize the model at random.
    Supported ways tried: a quantizer that is not serializable is refused, but it also refuses to move and cast.
    Removed by: a hook of nn.Module or PreTrainedModel by which a model is saved.
    """
    adapted = adapted_layers(model)
    if not adapted:
        return original(model, *args, **kwargs)
    arguments = inspect.signature(original).bind(model, *args, **kwargs).arguments
    state = arguments.get("state_dict")
    if state is not None and not any(last_part(str(key)).startswith("lora_") for key in state):
        return original(model, *args, **kwargs)  # the user chose what is written
    method = f"{type(model).__name__}.save_pretrained"
    if any(is_sharded(layer.lora_A) for layer in adapted.values()):
        raise ValueError(
            f"{method}: the layers are sharded, and one rank alone can't save them. Call "
            "lightning_qlora.save_adapter(model, FOLDER) on all ranks; it writes a PEFT folder."
        )
    if arguments.get("push_to_hub"):
        raise ValueError(f"{method}: push_to_hub=True is not supported. Call model.push_to_hub(NAME).")
    if arguments.get("is_main_process", True):
        save_adapter(model, arguments["save_directory"])
        warnings.warn(
            f"{method} wrote the adapter as a PEFT folder, because the base is in 4 bits. lightning_qlora.merge(model) "
            "makes dense layers, which save_pretrained writes.",
            stacklevel=3,
        )


@contextmanager
def offline(trust_remote_code: bool = False) -> Iterator[None]:
    """Within this the process asks the Hugging Face Hub nothing, unless a model's own code runs, which may need it.

    Upstream: huggingface_hub/constants.py, HF_HUB_OFFLINE. While transformers builds a model (backbone_utils.py,
    integrations/hub_kernels.py), it fetches what a config.json names: backbones, configs and compiled kernels.
    Supported ways tried: `local_files_only`, which is not passed on to these places; the environment variable, which is
    read once.
    Removed by: `local_files_only` of transformers reaching all that a config names.
    """
    constants: Any = import_module("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    try:
        _set_offline(constants, before or not trust_remote_code)
        yield
    finally:
        _set_offline(constants, before)


def _set_offline(constants: Any, value: bool) -> None:
    constants.HF_HUB_OFFLINE = value
    reset_sessions = getattr(import_module("huggingface_hub.utils"), "reset_sessions", None)
    if reset_sessions is not None:  # before 1.0 a session remembers it
        reset_sessions()


def _original(conversion: Any) -> Any:
    operations = getattr(conversion, "operations", ())
    return next((each.conversion for each in operations if hasattr(each, "conversion")), conversion)


def _is_of_a_quantizer(conversion: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))
