"""Merge an adapter into a base model: load it, convert it, set the adapter, merge, and save."""

import os
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.adapters.base_compatibility import Quantization
from lightning_qlora.adapters.load import config_of_adapter, set_adapter
from lightning_qlora.adapters.merge import merge_onto
from lightning_qlora.adapters.peft_layers import from_peft
from lightning_qlora.checks import check_choice
from lightning_qlora.config import Base, MergeDtype, QLoRAConfig
from lightning_qlora.conversion.convert import convert_module
from lightning_qlora.files.folder_writer import atomic_folder, check_free
from lightning_qlora.files.hub import check_files, copy_files
from lightning_qlora.files.safetensors_folder import read_config
from lightning_qlora.huggingface.base_folder import float_weights, gguf_of, load_base_model, stored_format
from lightning_qlora.huggingface.patches import forget_quantizer
from lightning_qlora.huggingface.quantize_on_load import quantize_while_loading
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.names import named
from lightning_qlora.survey.parts import Parts

NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".index.json")
LARGEST_FILE = "5GB"
TEMPLATES = "additional_chat_templates"  # transformers' folder of them
BESIDE_GGUF = (".json", ".jinja", ".txt", ".model", ".py", TEMPLATES)  # what it reads for a tokenizer


def merge_folder(
    base_model: str | os.PathLike[str],
    adapter: Adapter,
    output: str | os.PathLike[str],
    dtype: MergeDtype = "auto",
    base: Base = "quantized",
    trust_remote_code: bool = False,
) -> None:
    """Write the base model with the adapter merged, as `save_pretrained` does; after an error there is no output.

    The whole model is in memory, in the type of its files. The arguments are those of `merge_adapter` in cli.py.
    FileNotFoundError, FileExistsError or ValueError if the base is broken, or the output exists;
    CheckpointMismatchError if the adapter does not fit the base.
    """
    check_choice("dtype", dtype, get_args(MergeDtype))
    check_choice("base", base, get_args(Base))
    output = Path(output)
    check_free(output)
    trained = adapter.quantization or Quantization()
    config = QLoRAConfig(**trained._replace(init_lora_weights="default")._asdict())
    weights: dict[str, Tensor] = {}
    in_4_bits = stored_format(read_config(Path(base_model))).get("load_in_4bit")
    # Training may have loaded another type than that of the files.
    for loading_dtype in ("auto",) if in_4_bits else ("auto", torch.bfloat16, torch.float16):
        if in_4_bits:
            with quantize_while_loading(config, adapter=adapter):
                model = load_base_model(base_model, adapter, trust_remote_code=trust_remote_code)
        else:
            model = load_base_model(base_model, adapter, loading_dtype, trust_remote_code)
            if base == "float":
                weights = float_weights(model, from_peft(adapter, Parts.of(model).base))
            forget_quantizer(model.modules())
        with warnings.catch_warnings(), named(base_model):
            warnings.simplefilter("ignore")  # these warnings are about training
            convert_module(model, config_of_adapter(Parts.of(model), adapter, config))
        parts = Parts.of(model)
        layers = parts.base.layers
        for name, packed in adapter.bases.items():
            layers[name].set_packed_weights(packed)
        numbers = adapter.fingerprints
        others = [name for name in layers if name in numbers and numbers[name] != layers[name].base_fingerprint()]
        if not others or base == "float":
            break
    else:
        raise CheckpointMismatchError(
            f"{base_model}: {others[0]} has other 4-bit weights than in the training of {adapter.source}. Pass the "
            "base model of the training, or base='float' (--base float)."
        )
    set_adapter(parts, adapter)
    merge_onto(parts, weights, dtype)
    with atomic_folder(output) as partial:
        model.save_pretrained(partial, max_shard_size=LARGEST_FILE)
        _copy_other_files(base_model, partial, trust_remote_code)


def _copy_other_files(base_model: str | os.PathLike[str], folder: Path, trust_remote_code: bool = False) -> None:
    """Copy tokenizer, chat template and other files beside the weights; save the tokenizer in a GGUF file."""
    gguf = gguf_of(base_model)
    if gguf is None:
        copy_files(Path(base_model), folder, without=NOT_COPIED)
        return
    check_files(gguf.parent, BESIDE_GGUF)
    if (gguf.parent / TEMPLATES).is_dir():
        check_files(gguf.parent / TEMPLATES)
    tokenizer: Any = import_module("transformers").AutoTokenizer
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    tokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **options).save_pretrained(folder)
