"""Merge an adapter into a folder of weights, tensor by tensor: no model is built, and one shard is held in memory."""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn

from lightning_qlora.adapters.folder import PREFIX, Adapter
from lightning_qlora.adapters.ties import tie_broken, tied_names, trained_apart
from lightning_qlora.bnb_folder import bnb_config, empty_model, kept_dense, linear_layers, skip_words
from lightning_qlora.config import Onto, check_choice
from lightning_qlora.files import WeightFolder, read_json
from lightning_qlora.kernels.ops import quantize
from lightning_qlora.linear import DTYPES
from lightning_qlora.linear_state import CheckpointMismatchError
from lightning_qlora.merging.rounding import round_at_random
from lightning_qlora.quantize.packed import PackedWeight
from lightning_qlora.starts.since_start import BITS, belongs_to, fingerprint_of_weight
from lightning_qlora.writing import SHARD_BYTES, ShardWriter, check_free, whole_folder

FolderDtype = Literal["auto", "bf16", "fp16", "fp32", "4bit"]
FLOATS = ("F32", "BF16", "F16")  # in the words of a safetensors header
OUTPUT = "lm_head.weight"  # the output embedding, which config.json says is tied or not
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".index.json")


def merge_folder(
    base: str | os.PathLike[str],
    adapter: Adapter,
    output: str | os.PathLike[str],
    dtype: FolderDtype = "auto",
    onto: Onto = "decoded",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the base model's folder with the adapter folded in; the output is there whole, or not at all.

    Args:
        base: Folder of safetensors, in 16 or 32 bit or in bitsandbytes' 4 bits.
        adapter: What to fold in.
        output: A folder that does not exist yet, or is empty.
        dtype: Type of the written weights; "auto" is the base's. "4bit" quantizes the sum again, which loses quality.
        onto: The base's weights as they were while the adapter was trained ("decoded" from 4 bits), or as they are.
        shard_bytes: Largest file, and the most that is held in memory.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: If the base is broken, or the output is in use.
        CheckpointMismatchError: If the adapter does not fit the base; names file and key.
    """
    check_choice("dtype", dtype, get_args(FolderDtype))
    check_choice("onto", onto, get_args(Onto))
    output = Path(output)
    check_free(output)
    merging = _Merging(WeightFolder(base), adapter, dtype, onto)
    if dtype == "4bit":
        warnings.warn(
            "Merging into 4 bits loses quality: the sum of base and adapter is rounded to 16 levels again, an error "
            "larger than many adapters. Merge to bf16, or keep the adapter beside the 4-bit base.",
            stacklevel=2,
        )
    with whole_folder(output) as partial:
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


class _Merging:
    """One base folder and one adapter, their names matched."""

    def __init__(self, folder: WeightFolder, adapter: Adapter, dtype: FolderDtype, onto: Onto) -> None:
        self.folder, self.adapter, self.dtype, self.onto = folder, adapter, dtype, onto
        self.layer_of = {self._key(f"{name}.weight", "lora_A.weight"): name for name in adapter.layers}
        for weight in self.layer_of:
            self._check_type(weight)
        self.saved: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}
        for name, value in adapter.saved.items():
            key = self.folder.find(name)
            if key is not None:
                self.saved[key] = value
            elif not self._is_tied_copy(name):
                self.added[name] = value
        self._check_ties()
        self.packed: set[str] = set()  # layers of the output in 4 bits, for quantization_config
        self.model: nn.Module | None = None  # without weights: what transformers will make of a folder in 4 bits
        if dtype == "4bit" and (folder.folder / "config.json").is_file():
            self.model = empty_model(folder.folder, "which layers a folder in 4 bits must leave dense (dtype='4bit')")
        self.kept_dense = set() if self.model is None else kept_dense(self.model)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the output."""
        for path in self.folder.files():
            for key in [key for key, file in self.folder.file_of.items() if file == path]:
                if self._is_companion(key):
                    continue
                yield from self._merged(key)
        for name, value in self.added.items():
            yield name, self._cast(value)

    def config(self) -> dict[str, Any] | None:
        """The base's config.json, as it is true of the output."""
        path = self.folder.folder / "config.json"
        if not path.is_file():
            return None
        config = read_json(path)
        found = config.pop("quantization_config", None)
        if self.dtype == "4bit":
            choices, dtype = self._quantization(), config.get("dtype") or config.get("torch_dtype") or "bfloat16"
            assert self.model is not None
            skip = skip_words(linear_layers(self.model).keys() - self.packed, self.packed)
            made = bnb_config(choices["quant_type"], choices["double_quant"], skip, dtype)
            config["quantization_config"] = {**made, **(found or {}), "llm_int8_skip_modules": skip}
        elif self.dtype != "auto":
            name = "dtype" if "dtype" in config else "torch_dtype"
            config[name] = str(DTYPES[self.dtype]).removeprefix("torch.")
        if any(name.endswith(OUTPUT) for name in self.added):
            config["tie_word_embeddings"] = False
        return config

    def _merged(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """What becomes of one weight of the base: its new entry, or several where it is in 4 bits."""
        name, packed = self.layer_of.get(key), self.folder.is_packed(key) and key not in self.saved
        if name is None and not packed:
            tensor = self.saved[key] if key in self.saved else self.folder.tensors([key])[key]
            yield key, self._cast(tensor)
            return
        state = self.folder.tensors([k for k in self.folder.entries if k == key or k.startswith(key + ".")])
        layer = self._layer_in_model(key)
        if name is None and self.dtype == "4bit":
            self.packed.add(layer)
            yield from state.items()
            return
        transposed = self._is_transposed(key, name)
        if packed:
            weight = self._read(state, key)
            if name is not None:
                self._check_bits(name, weight)
            rows, dtype = weight.dequantize(), weight.dtype
        elif name in self.adapter.bases:
            weight = self.adapter.bases[name]
            rows, dtype = weight.dequantize(), weight.dtype
        else:
            if self.adapter.quantization is not None and self.adapter.quantization.get("base_moved"):
                self._refuse_base()
            rows, dtype = state[key].T if transposed else state[key], state[key].dtype
            if self.onto == "decoded":
                rows = self._quantized(rows, key).dequantize()
        if name is not None:
            rows = self._sum(rows, name)
        if self.dtype == "4bit" and layer not in self.kept_dense:
            self.packed.add(layer)
            entries = self._quantized(rows.to(dtype), key).bnb_state_dict(key)
            yield from ((k, value.clone()) for k, value in entries.items())  # safetensors refuses shared tables
            return
        wanted = dtype if self.dtype in ("auto", "4bit") else DTYPES[self.dtype]
        rows = rows.to(wanted) if name is None else round_at_random(rows, wanted, name)
        yield key, (rows.T if transposed else rows).contiguous()

    def _check_bits(self, name: str, weight: PackedWeight) -> None:
        """Refuse 4-bit weights that are not those an adapter started from."""
        if self.adapter.base_fingerprints.get(name) not in (None, fingerprint_of_weight(weight)):
            self._refuse_base()
        here = (weight.quant_type, weight.block_size, weight.nested_absmax is not None)
        need = belongs_to(self.adapter.quantization)
        if need is not None and here != tuple(self._quantization()[key] for key in BITS):
            there = ", ".join(f"{key}={value}" for key, value in zip(BITS, here, strict=True))
            raise ValueError(f"{self.adapter.source}: {self.folder.folder} has {name} in {there}. {need}")

    def _refuse_base(self) -> NoReturn:
        raise ValueError(
            f"{self.adapter.source}: the start of these adapters moved the weights they belong to, so they do not fit "
            f"{self.folder.folder}. Merge the Lightning checkpoint, which holds those weights, or pass the folder that "
            "save_quantized wrote as the base."
        )

    def _sum(self, rows: Tensor, name: str) -> Tensor:
        """W + s B A in fp32, with DoRA's magnitudes m as m / ||W + s B A|| times it; [out, in]."""
        layer = self.adapter.layers[name]
        if tuple(rows.shape) != (layer.lora_B.shape[0], layer.lora_A.shape[1]):
            key = self._key(f"{name}.weight", "lora_A.weight")
            raise CheckpointMismatchError(
                f"{self.folder.file_of[key]}: {key!r} has {rows.shape[0]} outputs and {rows.shape[1]} inputs, the "
                f"adapter {self.adapter.source} is for {layer.lora_B.shape[0]} and {layer.lora_A.shape[1]}."
            )
        total = rows.float() + self.adapter.scaling(name) * (layer.lora_B.float() @ layer.lora_A.float())
        if layer.magnitude is not None:
            total *= (layer.magnitude.float() / total.norm(dim=1))[:, None]
        return total

    def _layer_in_model(self, key: str) -> str:
        """The layer of a weight as the whole model names it; older files of it may lack the name of its body."""
        layer, body = key.removesuffix(".weight"), getattr(self.model, "base_model_prefix", "")
        names = () if self.model is None else linear_layers(self.model)
        return next((n for n in (layer, f"{body}.{layer}", layer.removeprefix(f"{body}.")) if n in names), layer)

    def _is_transposed(self, key: str, name: str | None) -> bool:
        """Whether transformers wants the weight as [in, out], as its Conv1D keeps it (in 4 bits it is [out, in])."""
        if name is None or self.folder.is_packed(key):
            return self.adapter.fan_in_fan_out and not key.endswith(OUTPUT)
        return self.adapter.is_transposed(name, self.folder.entries[key].shape)

    def _quantization(self) -> dict[str, Any]:
        """How the base was quantized in training; what the adapter does not say is the default."""
        known = self.adapter.quantization or {}
        return {"quant_type": "nf4", "block_size": 64, "double_quant": True} | {
            name: known[name] for name in ("quant_type", "block_size", "double_quant") if name in known
        }

    def _quantized(self, rows: Tensor, key: str) -> PackedWeight:
        try:
            return quantize(rows, **self._quantization())
        except ValueError as error:
            raise ValueError(f"{self.folder.file_of[key]}: {key!r}: {error}") from error

    def _check_type(self, key: str) -> None:
        """Refuse a weight that no adapter can be for, before anything is written."""
        entry = self.folder.entries[key]
        if not self.folder.is_packed(key) and (entry.dtype not in FLOATS or len(entry.shape) != 2):
            raise ValueError(
                f"{self.folder.file_of[key]}: {key!r} is {entry.dtype} of shape {list(entry.shape)}: an adapter can be "
                f"folded into a matrix of type {', '.join(FLOATS)}, or of bitsandbytes' 4 bits."
            )

    def _read(self, state: dict[str, Tensor], key: str) -> PackedWeight:
        try:
            return PackedWeight.from_bnb_state_dict(state, key)
        except ValueError as error:
            raise ValueError(f"{self.folder.file_of[key]}: {error}") from error

    def _cast(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or self.dtype in ("auto", "4bit"):
            return tensor.contiguous()
        return tensor.to(DTYPES[self.dtype]).contiguous()

    def _is_companion(self, key: str) -> bool:
        """Whether a tensor belongs to a 4-bit weight, as its scales do."""
        head, dot, _ = key.partition(".weight.")
        return bool(dot) and self.folder.is_packed(head + ".weight")

    def _key(self, name: str, part: str) -> str:
        key = self.folder.find(name)
        if key is None:
            raise CheckpointMismatchError(
                f"{self.adapter.source}: key '{PREFIX}{name.removesuffix('weight')}{part}' does not fit: "
                f"{self.folder.folder} has no tensor {name!r}. An adapter fits the model it was trained on."
            )
        return key

    def _check_ties(self) -> None:
        """Refuse an embedding trained apart from what it is tied to: a folder can untie an output embedding alone."""
        path = self.folder.folder / "config.json"
        words = read_json(path) if self.adapter.saved and path.is_file() else {}
        sizes = {config.get("vocab_size") for config in (words, words.get("text_config") or {})}
        trained = [value.shape for value in self.adapter.saved.values() if value.ndim == 2 and len(value) in sizes]
        if not trained:
            return
        names = {name for name, value in self.adapter.saved.items() if value.shape in trained}
        names |= {name for name, entry in self.folder.entries.items() if entry.shape in trained}
        try:
            model = empty_model(path.parent, "what the embedding that this adapter trained is tied to")
        except ValueError:
            if len(names) > 1:  # an output embedding is there, or was trained
                return
            raise
        for tied in tied_names(model):
            untied = len(tied) == 2 and any(name.endswith(OUTPUT) and name in self.adapter.saved for name in tied)
            if trained_apart(self.adapter, tied) and not untied:
                raise CheckpointMismatchError(tie_broken(self.adapter, tied))

    def _is_tied_copy(self, name: str) -> bool:
        """Whether a trained tensor that the base's files lack is tied to one that they have and that was trained."""
        return any(torch.equal(self.adapter.saved[name], value) for value in self.saved.values() if value.ndim == 2)
