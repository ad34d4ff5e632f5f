"""Merge an adapter into a model's folder, tensor by tensor: memory holds one file at a time, and no model is built."""

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_qlora.adapters.adapter import PREFIX, Adapter
from lightning_qlora.adapters.dequantized_folder import DequantizedFolder, published_format
from lightning_qlora.adapters.folder_layers import AdaptedTensor, assign_to_folder, find_layers
from lightning_qlora.adapters.merge import round_stochastically
from lightning_qlora.adapters.model_folder import OUTPUT, ModelFolder, empty_model
from lightning_qlora.adapters.tied_weights import check_tie, tied_names
from lightning_qlora.checks import check_choice
from lightning_qlora.config import Base, FolderDtype
from lightning_qlora.files.folder_writer import atomic_folder, check_free
from lightning_qlora.files.hub import check_links
from lightning_qlora.files.safetensors_folder import read_config
from lightning_qlora.files.shard_writer import SHARD_BYTES, ShardWriter
from lightning_qlora.huggingface.bnb_checkpoint import (
    always_dense_layers,
    bnb_config,
    linear_layers,
    name_in_files,
    names_in_files,
    skip_modules,
)
from lightning_qlora.huggingface.merged_weights import MergedWeights
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.qlora_linear import DTYPES
from lightning_qlora.layers.trainable_tokens import DELTA

FLOAT_NAMES = ("F32", "BF16", "F16")  # types in a safetensors header
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".index.json")


def merge_folder(
    base_model: str | os.PathLike[str],
    adapter: Adapter,
    output: str | os.PathLike[str],
    dtype: FolderDtype = "auto",
    base: Base = "quantized",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the base model's folder with the adapter merged; after an error there is no output.

    Args:
        base_model: Folder of safetensors, in 16 or 32 bits, in bitsandbytes' 4 bits, or in a published format that
            transformers dequantizes (FP8, MXFP4, compressed-tensors), in which the output is not written.
        adapter: The adapter.
        output: A folder that does not exist yet, or is empty.
        dtype: Type of the written weights; "auto": that of the base. "4bit" quantizes the sum, which loses quality.
        base: Weights that the adapter is added to: decoded from 4 bits ("quantized"), as in training, or as they are
            ("float").
        shard_bytes: Largest size of a file, and so of the memory for weights.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: If the base is broken, or the output exists.
        CheckpointMismatchError: If the adapter does not fit the base; names file and key.
    """
    check_choice("dtype", dtype, get_args(FolderDtype))
    check_choice("base", base, get_args(Base))
    output = Path(output)
    check_free(output)
    merging = _FolderMerge(base_model, adapter, dtype, base)
    check_links(merging.folder.folder)
    if dtype == "4bit":
        warnings.warn(
            "Merging into 4 bits loses quality: the sum of base and adapter is rounded to 16 levels again, an error "
            "larger than many adapters. Merge to bf16, or use the adapter with the 4-bit base.",
            stacklevel=2,
        )
    if isinstance(published := merging.folder.stored, DequantizedFolder):
        written = str(published.dtype).removeprefix("torch.") if dtype == "auto" else dtype
        warnings.warn(
            f"{base_model}: is in {published.method!r}, in which merged weights are not written: they are {written}.",
            stacklevel=2,
        )
    with atomic_folder(output) as partial:
        writer = ShardWriter(partial, shard_bytes)
        for key, tensor in merging.tensors():
            writer.add(key, tensor)
        writer.finish()
        for path in merging.folder.folder.iterdir():
            if path.is_file() and not path.name.endswith(NOT_COPIED) and path.name != "config.json":
                shutil.copy2(path, partial / path.name)
        config = merging.config()
        if config is not None:
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class _FolderMerge:
    """A base folder and an adapter, with their names matched: all names are those of the model's parameters."""

    def __init__(self, base_model: str | os.PathLike[str], adapter: Adapter, dtype: FolderDtype, base: Base) -> None:
        folder = ModelFolder.open(base_model)
        self.model = folder.model  # on the meta device
        adapter = assign_to_folder(adapter, folder)
        self.folder, self.adapter, self.dtype = folder, adapter, dtype
        self.weights = MergedWeights(folder, adapter, base)
        self.adapted = find_layers(adapter, folder)
        self._check_types()
        self.tokens = {key: name for name in adapter.tokens for key in self._keys_of_tokens(name)}
        packed = (adapter.quantization or {}).get("embeddings", []) if base == "quantized" else []
        self.embeddings = {folder.find(f"{name}.weight") for name in packed}  # in 4 bits in training
        keys = {name: folder.find(name) for name in adapter.saved if not name.endswith(DELTA)}
        self.saved = {key: adapter.saved[name] for name, key in keys.items() if key is not None}
        self.saved_names = {key: name for name, key in keys.items() if key is not None}
        # Trained tensors that the base lacks, except those that are tied to one that it has.
        known = [value for value in self.saved.values() if value.ndim == 2]
        missing = {name: adapter.saved[name] for name, key in keys.items() if key is None}
        self.added = {name: v for name, v in missing.items() if not any(torch.equal(v, other) for other in known)}
        self._check_ties()
        self._check_conversions()
        self.packed: set[str] = set()  # layers that the output has in 4 bits, for quantization_config
        if dtype == "4bit" and self.model is None and read_config(folder.folder):
            empty_model(folder.folder, "which layers a folder in 4 bits must leave dense (dtype='4bit')")
        self.always_dense_layers = set() if self.model is None else always_dense_layers(self.model)
        self.names_in_files: dict[str, str] = {}
        if dtype == "4bit" and self.model is not None:
            self.names_in_files = names_in_files(self.model, linear_layers(self.model), self.model.state_dict())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the output, by its key in the folder."""
        for names in self.folder.units():
            conversion = self.folder.conversions.get(names[0])
            if conversion is None:
                head, _, companion = names[0].partition(".weight.")  # such as the scales of a 4-bit weight
                if not (companion and self.folder.is_packed(head + ".weight")):
                    key = self.folder.key_of[names[0]]
                    for name, value in self._merged(names[0]):
                        own = name_in_files(name, self.names_in_files)  # the model's, or that of a 4-bit folder
                        yield own if key == names[0] else key + name.removeprefix(names[0]), value
            elif not self._changed(names):
                for key in conversion.keys:
                    yield key, self._cast(self.folder.stored.tensors([key])[key])
            else:
                merged = dict(pair for name in names for pair in self._merged(name))
                if merged.keys() == set(names):
                    merged = conversion.restore(merged)
                else:  # 4-bit weights can't be converted
                    merged = {name_in_files(name, self.names_in_files): value for name, value in merged.items()}
                yield from merged.items()
        for name, value in self.added.items():
            yield name, self._round(value, self._dtype_of_config(), name)

    def _changed(self, names: Iterable[str]) -> list[str]:
        known = self.adapted.keys() | self.saved.keys() | self.tokens.keys() | self.embeddings
        return [name for name in names if name in known]

    def _check_conversions(self) -> None:
        """Refuse a conversion of changed weights that transformers can't reverse."""
        for name in self._changed(self.folder.conversions):
            if self.folder.conversions[name].places is None:
                raise ValueError(
                    f"{self.folder.where(name)} become {name!r} when transformers loads them, and it can't convert "
                    "them back. Load the model with lightning_qlora and the adapter, merge() it, and save it."
                )

    def config(self) -> dict[str, Any] | None:
        """The base's config.json, changed so that it describes the output."""
        config = read_config(self.folder.folder)
        if not config:
            return None
        published = published_format(config)
        found = config.pop("quantization_config", None)
        (config.get("text_config") or {}).pop("quantization_config", None)
        if self.dtype == "4bit":
            choices, dtype = self.weights.quantization(), config.get("dtype") or config.get("torch_dtype") or "bfloat16"
            layers = set() if self.model is None else linear_layers(self.model).keys()
            skip = skip_modules(layers - self.packed, self.packed)
            made = bnb_config(choices["quant_type"], choices["double_quant"], skip, dtype)
            config["quantization_config"] = {**made, **((not published and found) or {}), "llm_int8_skip_modules": skip}
        elif self.dtype != "auto":
            name = "dtype" if "dtype" in config else "torch_dtype"
            config[name] = str(DTYPES[self.dtype]).removeprefix("torch.")
        if any(name.endswith(OUTPUT) for name in self.added):
            config["tie_word_embeddings"] = False
        return config

    def _merged(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """The entries of the output for one weight of the base: several if it is in 4 bits."""
        adapted, packed = self.adapted.get(key), self.folder.is_packed(key) and key not in self.saved
        if adapted is None and not packed:
            tensor = self._saved(key) if key in self.saved else self.folder.tensors([key])[key]
            if key in self.embeddings:
                tensor = self.weights.quantized(tensor, key, double_quant=False).dequantize()
            if (of := self.tokens.get(key)) is not None:
                rows = self.adapter.saved[f"{of}.{DELTA}"].to(tensor)
                index = torch.tensor(self.adapter.tokens[of], device=tensor.device)
                tensor = tensor.index_copy(0, index, rows)
            yield key, self._cast(tensor)
            return
        layer = key.removesuffix(".weight")
        if adapted is None and self.dtype == "4bit":
            self.packed.add(layer)
            yield from self.folder.entries_of(key).items()
            return
        made = []
        for name, rows, dtype in self.weights.of_tensor(key, adapted):
            of_expert = self.adapter.expert_parameter(name) is not None  # bitsandbytes has none in 4 bits
            if self.dtype == "4bit" and not of_expert and layer not in self.always_dense_layers:
                self.packed.add(layer)
                entries = self.weights.quantized(rows.to(dtype), key).bnb_state_dict(key)
                yield from ((k, value.clone()) for k, value in entries.items())  # safetensors refuses shared tables
                return
            wanted = self._wanted(dtype)
            made.append(rows.to(wanted) if adapted is None else round_stochastically(rows, wanted, name))
        of_base = adapted or AdaptedTensor([layer], self.folder.is_transposed(key, self.adapter, None))
        yield key, of_base.join(made)

    def _saved(self, key: str) -> Tensor:
        """What trained in full in place of a tensor of the base, in the type of that, as `merge` rounds it."""
        value = self.saved[key]
        dtype = value.dtype if self.folder.is_packed(key) else self.folder.tensors([key])[key].dtype
        return self._round(value, dtype, self.saved_names[key])

    def _round(self, value: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
        if not value.is_floating_point() or dtype is None:
            return self._cast(value)
        return round_stochastically(value.float(), self._wanted(dtype), name).contiguous()

    def _dtype_of_config(self) -> torch.dtype | None:
        """The type of the base that its config.json names, if it does."""
        config = read_config(self.folder.folder)
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
        return dtype if isinstance(dtype, torch.dtype) else None

    def _wanted(self, dtype: torch.dtype) -> torch.dtype:
        """The type of the output, for a weight of this type in the base."""
        return dtype if self.dtype in ("auto", "4bit") else DTYPES[self.dtype]

    def _cast(self, tensor: Tensor) -> Tensor:
        return (tensor.to(self._wanted(tensor.dtype)) if tensor.is_floating_point() else tensor).contiguous()

    def _keys_of_tokens(self, name: str) -> list[str]:
        """The keys of an embedding, and of the output embedding that is tied to it, if the folder has both."""
        key = self.folder.find(f"{name}.weight")
        rows, largest = self.adapter.saved[f"{name}.{DELTA}"], max(self.adapter.tokens[name])
        shape = (0, 0) if key is None or self.folder.is_packed(key) else self.folder.entries[key].shape
        if key is None or largest >= shape[0] or rows.shape[1] != shape[1]:
            raise CheckpointMismatchError(
                f"{self.adapter.source}: key '{PREFIX}{name}.{DELTA}' has rows of {rows.shape[1]} values up to index "
                f"{largest}, and '{name}.weight' in {self.folder.folder} the dense shape {list(shape)}. For new tokens "
                "save the base after resize_token_embeddings, and merge with that folder."
            )
        tied = read_config(self.folder.folder).get("tie_word_embeddings")
        return [key, *(other for other in self.folder.entries if tied and other.endswith(OUTPUT) and other != key)]

    def _check_types(self) -> None:
        """Refuse weights that can have no adapter before anything is written."""
        for key, adapted in self.adapted.items():
            entry = self.folder.entries[key]
            is_matrix = adapted.stacked or len(entry.shape) == 2
            if not self.folder.is_packed(key) and (entry.dtype not in FLOAT_NAMES or not is_matrix):
                raise ValueError(
                    f"{self.folder.where(key)} is {entry.dtype} of shape {list(entry.shape)}: an adapter can be "
                    f"merged into a matrix of type {', '.join(FLOAT_NAMES)}, or in bitsandbytes' 4 bits."
                )

    def _check_ties(self) -> None:
        """Refuse an embedding that breaks a tie: in a folder only an output embedding can be untied."""
        content = read_config(self.folder.folder) if self.adapter.saved else {}
        sizes = {config.get("vocab_size") for config in (content, content.get("text_config") or {})}
        trained = [value.shape for value in self.adapter.saved.values() if value.ndim == 2 and len(value) in sizes]
        if not trained:
            return
        names = {name for name, value in self.adapter.saved.items() if value.shape in trained}
        names |= {name for name, entry in self.folder.entries.items() if entry.shape in trained}
        if self.model is None and len(names) > 1:  # an output embedding is there, or was trained
            return
        model = self.model or empty_model(self.folder.folder, "what the embedding that this adapter trained is tied to")
        for tied in tied_names(model):
            untied = len(tied) == 2 and any(name.endswith(OUTPUT) and name in self.adapter.saved for name in tied)
            if not untied:
                check_tie(self.adapter, tied)
