"""Changes to transformers' code and objects, each with the upstream file, the reason, and what would remove it."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

from torch import nn

from lightning_qlora.adapters.save_load import save_adapter
from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.experts import QLoRAExperts
from lightning_qlora.layers.names import is_transformers_model, last_part, owner_name
from lightning_qlora.layers.patches import make_changes, replaces, wrap_once
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.layers.reasons import LOADED
from lightning_qlora.layers.tensor_parallel import SPLIT_EXPERTS, split, unknown_style

# model config, device_map, gguf_file, transformers' function -> HfQuantizer or None, model config, device_map
QuantizerFor = Callable[[Any, Any, str | None, Callable[[Any], tuple[Any, Any, Any]]], tuple[Any, Any, Any]]

_quantizer_for: ContextVar[QuantizerFor | None] = ContextVar("lightning_qlora_quantizer_for", default=None)


@contextmanager
def default_quantizer(quantizer_for: QuantizerFor) -> Iterator[None]:
    """Within this, in this thread or task, `from_pretrained` uses the quantizer of `quantizer_for` if it names none.

    Upstream: transformers/quantizers/auto.py, get_hf_quantizer, as transformers/modeling_utils.py calls it. A quantizer
    of `register_quantizer` is used only if the caller of from_pretrained passes its quantization_config, and then not
    for a folder in bitsandbytes' 4 bits, whose own quantization_config takes precedence.
    Removed by: a context in transformers that sets the quantization_config of the models loaded within it.
    """

    def ask(original: Any, config: Any, quantization_config: Any, device_map: Any, *args: Any, **kwargs: Any) -> Any:
        def transformers_choice(requested: Any) -> Any:
            return original(config, requested, device_map, *args, **kwargs)

        of_context = _quantizer_for.get()
        if quantization_config is not None or of_context is None:
            return transformers_choice(quantization_config)
        return of_context(config, device_map, kwargs.get("gguf_file"), transformers_choice)

    wrap_once(import_module("transformers.modeling_utils"), "get_hf_quantizer", ask)
    load_without_data()
    make_changes("transformers")
    token = _quantizer_for.set(quantizer_for)
    try:
        yield
    finally:
        _quantizer_for.reset(token)


def request_dequantizing(config: Any, stored: dict[str, Any]) -> None:
    """Let transformers' quantizer of a folder's format dequantize it, as its config's argument `dequantize` does.

    Upstream: transformers/quantizers/auto.py, merge_quantization_configs, takes the folder's values from the
    model's config, a copy of `from_pretrained`. With an argument it warns, and replaces the list of dense layers.
    Removed by: an argument of get_hf_quantizer.
    """
    config.quantization_config = stored | {"dequantize": True}


def wrap_operations(conversions: list[Any], wrap: Callable[[list[Any]], Any], last: Any) -> None:
    """Put one operation in place of all operations of each conversion of a load, and one behind it.

    Upstream: transformers/core_model_loading.py, WeightConverter, whose objects are made for one load. transformers
    sets `quantization_operation` only for a quantizer of dense files.
    Supported ways tried: copies with other operations; but a model is saved by the conversions that loaded it.
    Removed by: transformers asking a quantizer of quantized files for that operation too.
    """
    for conversion in conversions:
        if hasattr(conversion, "operations"):
            conversion.operations = [wrap(conversion.operations)]
            conversion.quantization_operation = last


def unwrap_operations(model: nn.Module, wrapper: type) -> None:
    """Undo `wrap_operations` in the conversions by which a model was loaded.

    Upstream: transformers/core_model_loading.py keeps them as `_weight_conversions` of the model, which is saved by
    their reverse.
    Removed by: what would remove `wrap_operations`.
    """
    for conversion in getattr(model, "_weight_conversions", None) or ():
        if isinstance(wrapped := next(iter(getattr(conversion, "operations", ())), None), wrapper):
            conversion.operations = getattr(wrapped, "operations", None) or [wrapped]
            conversion.quantization_operation = None


def load_without_data() -> None:
    """Let a quantizer say what the files of a model have, where their values are read after the model is sharded.

    Upstream: transformers/modeling_utils.py, PreTrainedModel._load_pretrained_model, reads all values at once.
    Supported ways tried: a state dict on the meta device, which from_pretrained accepts in place of a name only; an
    HfQuantizer's operations, which get the values; device_map="meta", which leaves buffers and new heads without data.
    Removed by: from_pretrained returning a model whose values are read later.
    """

    def load(original: Any, model: Any, state: Any, files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        quantizer = load_config.hf_quantizer
        if getattr(quantizer, "folder", None) is None:
            return original(model, state, files, load_config, *args, **kwargs)
        return quantizer.load_without_data(original, model, load_config)

    wrap_once(import_module("transformers.modeling_utils").PreTrainedModel, "_load_pretrained_model", load)


def forget_quantizer(module: nn.Module) -> None:
    """Remove the marks of quantization that transformers and `QLoRAQuantizer` left on the models in a module.

    Upstream: transformers/modeling_utils.py (from_pretrained, to, half, save_pretrained) and quantizers/base.py
    (postprocess_model): a model with these marks refuses to move, to be cast and to be saved. Its saving would reverse
    the conversions of 4-bit entries, which are gone.
    Removed by: a quantizer in transformers being able to hand over a model that it is done with.
    """
    for part in module.modules():
        if is_transformers_model(part):
            for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", LOADED):
                vars(part).pop(name, None)
            for name in ("quantization_config", "_is_quantized"):
                vars(part.config).pop(name, None)
            if conversions := vars(part).get("_weight_conversions"):
                part._weight_conversions = [c for c in conversions if not _is_of_a_quantizer(c)]  # type: ignore[assignment]


@replaces("transformers.distributed.mixin:apply_tensor_parallelism")
def split_4_bit_layers_of_tp_plans(
    original: Any, model: nn.Module, mesh: Any, plan: dict[str, str], *args: Any, **kwargs: Any
) -> Any:
    """Let a plan of transformers (DistributedConfig) split 4-bit layers.

    Upstream: transformers/distributed/mixin.py, maybe_distribute_model, calls apply_tensor_parallelism, whose styles
    split every parameter of a linear layer in the same way, also A, B and the second-level scales.
    Supported ways tried: `HfQuantizer.update_parallel_plan`, which is not asked for the plan that the user passes;
    styles of our own, which a plan would have to name.
    Removed by: styles that ask a layer to split its parameters.
    """
    styles: Any = import_module("transformers.distributed.tensor_parallel")
    modules, of_others = dict(model.named_modules()), dict[str, str]()
    for name, style in plan.items():
        layer = modules.get(name)
        if isinstance(layer, QLoRALinear):
            by_inputs = isinstance(styles.ALL_PARALLEL_STYLES[style], styles.RowwiseParallel)
            if not by_inputs and not isinstance(styles.ALL_PARALLEL_STYLES[style], styles.ColwiseParallel):
                raise ValueError(f"{name}: {unknown_style(style)}")
            split(layer, mesh, by_inputs)
        if isinstance(layer, QLoRAExperts):
            raise ValueError(f"{name}: {SPLIT_EXPERTS}")
        if not isinstance(modules.get(owner_name(name)), QLoRALinear):
            of_others[name] = style
    return original(model, mesh, of_others, *args, **kwargs)


@replaces("transformers.modeling_utils:PreTrainedModel.save_pretrained")
def save_adapter_instead(original: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Let `save_pretrained` of a converted model write its adapter, as that of a PeftModel does.

    Upstream: transformers/modeling_utils.py, PreTrainedModel.save_pretrained, writes the model's state dict; that of a
    converted model has no base, so `from_pretrained` would initialize the model at random. HF Trainer, `push_to_hub`
    and `on_save_checkpoint` of LightningModules call it. A state dict that is passed to it and holds no adapters is
    written.
    Supported ways tried: a quantizer that is not serializable is refused, but it also refuses to move and cast.
    Removed by: a hook of nn.Module or PreTrainedModel by which a model is saved.
    """
    adapted = adapted_layers(model)
    if not adapted:
        return original(model, *args, **kwargs)
    given = inspect.signature(original).bind(model, *args, **kwargs).arguments
    state = given.get("state_dict")
    if state is not None and not any(last_part(str(key)).startswith("lora_") for key in state):
        return original(model, *args, **kwargs)
    what = f"{type(model).__name__}.save_pretrained"
    if any(is_sharded(layer.lora_A) for layer in adapted.values()):
        raise ValueError(
            f"{what}: the layers are sharded, and one rank alone can't save them. Call "
            "lightning_qlora.save_adapter(model, FOLDER) on all ranks; it writes a PEFT folder."
        )
    if given.get("push_to_hub"):
        raise ValueError(f"{what}: push_to_hub=True is not supported. Call model.push_to_hub(NAME).")
    if given.get("is_main_process", True):
        save_adapter(model, given["save_directory"])
        warnings.warn(
            f"{what} wrote the adapter as a PEFT folder, because the base is in 4 bits. lightning_qlora.merge(model) "
            "makes dense layers, which save_pretrained writes.",
            stacklevel=3,
        )


def _is_of_a_quantizer(conversion: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))
