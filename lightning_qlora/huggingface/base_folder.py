"""The model of a base folder, or of a GGUF file, as transformers loads it; the float weights of its layers."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_qlora.adapters.adapter import Adapter, State
from lightning_qlora.adapters.load import tied_names
from lightning_qlora.checks import DAMAGED, one_line
from lightning_qlora.experts.expert_selection import expert_parameter
from lightning_qlora.files.hub import check_files, file_in
from lightning_qlora.files.safetensors_folder import INDEX, WEIGHTS, WeightFolder
from lightning_qlora.huggingface.model_config import ElsewhereError, model_without_values, read_model_config
from lightning_qlora.huggingface.patches import offline
from lightning_qlora.layers.kinds import kind_of
from lightning_qlora.layers.names import DELTA, last_part, owner_name
from lightning_qlora.survey.parts import Parts

# Classes for a model that was trained without the head of its folder, or with a new one.
OTHER_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
LOAD_IT_YOURSELF = "Load the model in Python, convert it with adapter=FOLDER, call merge(model), and save it."
CANNOT_DEQUANTIZE = (
    "transformers can dequantize MXFP4, FP8 and GGUF while it loads from 5.22 on, compressed-tensors from 5.23 on, and "
    "no GPTQ, AWQ or 8 bits of bitsandbytes: install that version, or use a folder of the model in 16 bits."
)


def gguf_of(source: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that a path names, or the only one in a folder without safetensors."""
    path = Path(source)
    if path.suffix == ".gguf":
        return path
    if not path.is_dir() or (path / WEIGHTS).is_file() or (path / INDEX).is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"{path}: has {len(files)} GGUF files, {[file.name for file in files][:5]}. Pass one of them.")
    return file_in(path, files[0].name) if files else None


def load_base_model(
    source: str | os.PathLike[str], adapter: Adapter, dtype: Any = "auto", trust_remote_code: bool = False
) -> Any:
    """The transformers model of a folder or GGUF file that has the layers of an adapter, on the CPU.

    It is dequantized. `dtype` as in `from_pretrained`. Raises FileNotFoundError or ValueError if a file is missing or
    broken, or transformers can't make the model.
    """
    transformers: Any = import_module("transformers")
    gguf = gguf_of(source)
    folder = Path(source) if gguf is None else gguf.parent
    location: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    of_config: dict[str, Any] = {}
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if gguf is None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: is no folder. Pass the folder of the model, or a GGUF file.")
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: has no config.json, which names the model. {LOAD_IT_YOURSELF}")
        check_files(folder)
        WeightFolder(folder)  # its errors name file and key
    else:
        of_config["gguf_file"] = gguf.name
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _one_line_errors(source, "read its config"):
        config = read_model_config(folder, trust_remote_code, **of_config)
        stored = stored_format(config.to_dict())
    check_format(stored, source)
    if stored and not stored.get("load_in_4bit"):
        config.update({"quantization_config": stored | {"dequantize": True}})
    model_class, untied = _class_for(config, adapter, trust_remote_code)
    if untied:
        config.update({"tie_word_embeddings": False})
    with _one_line_errors(source, "load it"), offline(trust_remote_code), torch.device("cpu"):
        model, loading = model_class.from_pretrained(folder, config=config, **location, **of_config, **options)
    for name, shape, expected in loading["mismatched_keys"]:
        raise ValueError(
            f"{source}: {name!r} has shape {list(shape)}, and a {type(model).__name__} with this config.json has "
            f"{list(expected)}. {DAMAGED}"
        )
    for name in sorted(set(loading["missing_keys"]) - adapter.saved.keys()):
        raise ValueError(
            f"{source}: has no tensor for {name!r} of a {type(model).__name__}, and the adapter has none either. "
            f"{LOAD_IT_YOURSELF}"
        )
    return model


@contextmanager
def _one_line_errors(source: object, action: str) -> Iterator[None]:
    """Name the source in an error of transformers; what to do stands before its text, which may be long."""
    try:
        yield
    except ElsewhereError:
        raise
    except Exception as error:  # wrong values make the code of configs and models raise errors of any type
        remedy = ""
        if "trust_remote_code" in str(error):
            remedy = "read the Python files of the model, and pass trust_remote_code=True to run them; "
        raise ValueError(f"{source}: {remedy}transformers can't {action}: {one_line(error)}") from error


def stored_format(config: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of a config.json; empty without one. bitsandbytes' 4 bits have `load_in_4bit` in it."""
    text_config = config.get("text_config") or {}
    quantization = config.get("quantization_config") or text_config.get("quantization_config")
    return quantization if isinstance(quantization, dict) else {}


def can_compose() -> bool:
    """Whether transformers can dequantize before other operations on a weight: from 5.22 on."""
    return hasattr(import_module("transformers.quantizers.base").HfQuantizer, "get_load_operations")


def takes_dequantize(quantization: dict[str, Any]) -> bool:
    classes: Any = import_module("transformers.quantizers.auto").AUTO_QUANTIZATION_CONFIG_MAPPING
    method = quantization.get("quant_method")
    config_class = classes.get(method) if isinstance(method, str) else None
    return can_compose() and config_class is not None and "dequantize" in signature(config_class).parameters


def check_format(stored: dict[str, Any], source: object) -> None:
    """Raise ValueError for a `stored_format` that neither we nor transformers can turn into float weights."""
    if stored and not stored.get("load_in_4bit") and not takes_dequantize(stored):
        raise ValueError(f"{source}: is in {stored.get('quant_method')!r}. {CANNOT_DEQUANTIZE}")


def _class_for(config: Any, adapter: Adapter, trust_remote_code: bool) -> tuple[Any, bool]:
    """The first class of transformers that has the layers of an adapter; whether the adapter unties its embeddings.

    The class of the folder comes first. An output embedding that was trained alone needs a model in which it is not
    tied to the embedding.
    """
    transformers: Any = import_module("transformers")
    architecture = str((config.architectures or ["AutoModelForCausalLM"])[0])
    classes = [architecture]
    if not hasattr(transformers, architecture):
        classes = [name for name in getattr(config, "auto_map", None) or {} if name.startswith("AutoModel")]
    needed = {*adapter.modules} | {key.removesuffix(f".{DELTA}") for key in adapter.saved}
    heads = [v for key, v in adapter.saved.items() if v.ndim == 2 and ("classifier" in key or "score" in key)]
    first = None
    errors = []
    for number, name in enumerate([*classes, *OTHER_CLASSES]):
        if number == len(classes) and heads:
            config.update({"num_labels": min(len(head) for head in heads)})
        try:
            model = model_without_values(config, name, trust_remote_code)
        except Exception as error:  # no such model of this architecture, or one that can't be built without values
            errors.append(f"{name}: {one_line(error)}")
            continue
        model_class = getattr(transformers, name)
        first = first or model_class
        parts = Parts.of(model)
        names = {*dict(parts.places), *dict(model.named_buffers()), *(each.name for each in parts.dense_parameters)}
        if needed <= names:
            outputs = {f"{name}.weight" for name, layer in parts.named if id(layer) in parts.heads_of_models}
            trained = outputs & adapter.saved.keys()
            pairs = [pair for pair in tied_names(parts) if len(pair) == 2 and trained & {*pair}]
            return model_class, not all(map(adapter.has_one_value, pairs))
    if first is None:
        name = (config.architectures or ["model"])[0]
        raise ValueError(f"{config.name_or_path}: transformers makes no {name} ({errors[0]}). {LOAD_IT_YOURSELF}")
    return first, False  # what does not fit is refused by name when the adapter is loaded


def float_weights(model: nn.Module, names: Iterable[str]) -> State:
    """Layer of an adapter (`from_peft`) -> its weight in a model that is not converted: views of its parameters.

    A weight is [out, in], of a stack [experts, out, in].
    """
    modules = dict(model.named_modules())
    weights = {}
    for name in names:
        if name in modules:
            weight = modules[name].get_parameter("weight").detach()
            transposed = kind_of(type(modules[name])).transposed
        else:
            part = expert_parameter(modules[owner_name(name)], last_part(name))
            assert part is not None  # as `from_peft` found it
            parameter = part.owner.get_parameter(part.key).detach()
            weight = parameter.view(part.experts, -1, parameter.shape[-1])
            transposed = part.transposed
        weights[name] = weight.mT if transposed else weight
    return weights
