"""Folders in a published 8- or 4-bit format, which transformers dequantizes while it loads them."""

from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

CANNOT_DEQUANTIZE = (
    "transformers can dequantize MXFP4, FP8 and GGUF while it loads from 5.22 on, compressed-tensors from 5.23 on, and "
    "no GPTQ, AWQ or 8 bits of bitsandbytes: install that version, or use a folder of the model in 16 bits."
)


def published_format(config: dict[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a config.json in another format than bitsandbytes' 4 bits; None if there is none."""
    text_config = config.get("text_config") or {}
    quantization = config.get("quantization_config") or text_config.get("quantization_config")
    if isinstance(quantization, dict) and not quantization.get("load_in_4bit"):
        return quantization
    return None


def can_compose() -> bool:
    """Whether transformers can dequantize before other operations on a weight: from 5.22 on."""
    if find_spec("transformers") is None or find_spec("transformers.core_model_loading") is None:
        return False
    return hasattr(import_module("transformers.quantizers.base").HfQuantizer, "get_load_operations")


def takes_dequantize(quantization: dict[str, Any]) -> bool:
    """Whether transformers can dequantize the format of a `quantization_config` while it loads."""
    classes: Any = import_module("transformers.quantizers.auto").AUTO_QUANTIZATION_CONFIG_MAPPING
    config_class = classes.get(quantization.get("quant_method"))
    return can_compose() and config_class is not None and "dequantize" in signature(config_class).parameters
