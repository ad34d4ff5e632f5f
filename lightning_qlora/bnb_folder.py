"""Which layers transformers takes for 4-bit ones when it loads a folder of bitsandbytes', and how a folder tells it.

Source: transformers 5, quantizers/quantizers_utils.py (should_convert_module), quantizers/quantizer_bnb_4bit.py and
integrations/bitsandbytes.py (replace_with_bnb_linear): every nn.Linear and Conv1D becomes a Linear4bit unless a name in
the folder's `llm_int8_skip_modules`, or in the model's own `_keep_in_fp32_modules`, fits its name.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer that is an nn.Linear or a transformers Conv1D, in 4 bits or not."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    }


def kept_dense(model: nn.Module) -> set[str]:
    """Names of the linear layers that transformers keeps dense whatever a folder says, as T5's `wo`."""
    names: Any = getattr(model, "_keep_in_fp32_modules", None) or ()

    def is_replaced(layer: nn.Module) -> bool:
        kind = getattr(layer, "dense_class", type(layer))  # what a converted layer was
        return kind is nn.Linear or kind.__name__ == "Conv1D"

    return {
        name
        for name, layer in linear_layers(model).items()
        if not is_replaced(layer) or any(_skips(word, name) for word in names)
    }


def skip_words(dense: Iterable[str], packed: Collection[str]) -> list[str]:
    """`llm_int8_skip_modules` that fit these dense layers and none of the packed ones.

    A plain name also fits every name that ends in it ("classifier" fits "pre_classifier"). Where that is a layer in 4
    bits, the name goes out as a regular expression of its whole: no name ends in "$".
    """
    return [
        f"{re.escape(name)}$" if any(_skips(name, other) for other in packed) else name for name in sorted(set(dense))
    ]


def _skips(word: str, name: str) -> bool:
    """Whether transformers leaves a layer of this name dense because of this word."""
    return name.endswith(word) or re.match(rf"(?:{word})(?:(?<=\.)|(?=\.|$))", name) is not None


def bnb_config(quant_type: str, double_quant: bool, skip: list[str], dtype: str) -> dict[str, Any]:
    """transformers' quantization_config of a folder in bitsandbytes' 4 bits."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skip,
    }


def empty_model(folder: Path, what_for: str) -> nn.Module:
    """The transformers model that a folder's config.json names, on the meta device: its layers, and no weights.

    Args:
        folder: A model's folder.
        what_for: What only such a model tells, for the message.

    Raises:
        ValueError: If transformers is not installed, or has no such model.
    """
    try:
        import transformers

        config: Any = transformers.AutoConfig.from_pretrained(folder)
        kind: Any = getattr(transformers, config.architectures[0])
        with torch.device("meta"):
            model: nn.Module = kind._from_config(config)
    except (ImportError, AttributeError, TypeError, IndexError, ValueError, OSError) as error:
        raise ValueError(
            f"{folder / 'config.json'}: transformers can't make a model of it ({str(error).splitlines()[0]}), and only "
            f"that says {what_for}."
        ) from error
    return model
