"""transformers' config of a model that others made: it runs no code, and no value of it names another file or model.

transformers follows what a config.json names, while it reads the config and while it builds the model: a repository of
compiled kernels, a backbone, a file of weights. These values are refused; what else asks the hub, `offline` stops.
"""

import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_qlora.checks import shown
from lightning_qlora.files.hub import check_name, file_in
from lightning_qlora.files.safetensors_folder import file_names_in, read_config
from lightning_qlora.huggingface.patches import offline

ADAPTER = "adapter_config.json"
# Ends of names whose values may be in a repository.
OF_THE_HUB = ("_implementation", "_implementation_internal", "backbone", "architecture")
OF_TIMM = "checkpoint_path"  # an argument of timm.create_model, in the arguments that a config has for it


class ElsewhereError(ValueError):
    """A folder names something outside of it."""


def read_model_config(source: str | os.PathLike[str], trust_remote_code: bool = False, **options: Any) -> Any:
    """The config of a folder, or of a hub name, of which only config.json is downloaded.

    `options` as in `from_pretrained`. ElsewhereError for a value that names something outside of the folder.
    """
    transformers: Any = import_module("transformers")
    is_folder = os.path.isdir(source)
    if is_folder:
        _check_no_adapter(Path(source))
        if "gguf_file" not in options:  # which holds the config
            _check_names(Path(source))
    content, _ = transformers.PretrainedConfig.get_config_dict(source, local_files_only=is_folder, **options)
    _check_values(content, source)
    options |= {"trust_remote_code": trust_remote_code, "local_files_only": is_folder}
    with offline(trust_remote_code):  # the config.json of a hub name is in the cache now
        config = transformers.AutoConfig.from_pretrained(source, **options)
    for part in _parts(config, transformers.PretrainedConfig):
        if getattr(part, "use_pretrained_backbone", False):  # the weights are those of the folder
            part.update({"use_pretrained_backbone": False})
    return config


def model_without_values(config: Any, name: str, trust_remote_code: bool = False, **options: Any) -> Any:
    """A model of a class of transformers, or of one of its Auto classes, on the meta device."""
    model_class = getattr(import_module("transformers"), name)
    with torch.device("meta"), offline(trust_remote_code):
        if hasattr(model_class, "from_config"):
            return model_class.from_config(config, trust_remote_code=trust_remote_code, **options)
        return model_class._from_config(config, **options)


def _check_no_adapter(folder: Path) -> None:
    if file_in(folder, ADAPTER).exists():
        raise ElsewhereError(
            f"{folder}: has an {ADAPTER}, so transformers would load that adapter too, or the model that it names. "
            "Remove it, or pass the folder of the base model."
        )


def _check_names(folder: Path) -> None:
    """Refuse names of files in a config.json that are not in its folder."""
    content = read_config(folder)
    subject = f"{folder / 'config.json'}: {{}}"
    for name in content.get("configuration_files") or ():
        check_name(subject.format("a name in 'configuration_files'"), name)
        file_in(folder, name)
    weights = content.get("transformers_weights")
    if weights is not None:
        check_name(subject.format("'transformers_weights'"), weights)
        if weights.endswith(".json"):
            for name in file_names_in(file_in(folder, weights)).values():
                file_in(folder, name)


def _check_values(content: dict[str, Any], source: object) -> None:
    """Refuse values of a config.json, also in the configs of its parts, for which transformers reads something else."""
    for name, value in _entries(content):
        words = value.values() if isinstance(value, dict) else [value]
        has_path = any(isinstance(word, str) and re.search("[/:]", word) for word in words)
        if (has_path and name.endswith(OF_THE_HUB)) or (value and name == OF_TIMM):
            raise ElsewhereError(
                f"{source}: its config.json has {name}={shown(value)}, which names a model, kernels or a file "
                "elsewhere. Remove it, or replace it by what the folder has."
            )


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of each entry, in all dicts and lists."""
    rest = [content]
    while rest:
        part = rest.pop()
        if isinstance(part, dict):
            yield from ((str(name), value) for name, value in part.items())
            rest += part.values()
        elif isinstance(part, list):
            rest += part


def _parts(config: Any, kind: type) -> Iterator[Any]:
    """A config, and the configs of its parts."""
    yield config
    for part in vars(config).values():
        if isinstance(part, kind):
            yield from _parts(part, kind)
