"""Writes a model as safetensors files of a largest size, with the names and the index that transformers reads."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lightning_qlora.files.safetensors_folder import INDEX, WEIGHTS

SHARD_BYTES = 2_000_000_000  # size of the files we write, which is held in memory at once


class ShardWriter:
    """Writes the tensors of a model to safetensors files in a folder, with at most one file in memory."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes, self.total = folder, shard_bytes, 0
        self.shards: list[list[str]] = []  # the keys in each file
        self.held: dict[str, Tensor] = {}

    def add(self, key: str, tensor: Tensor) -> None:
        """Add a tensor. The tensors before it are written first if the file would become larger than shard_bytes."""
        held = sum(value.nbytes for value in self.held.values())
        if self.held and held + tensor.nbytes > self.shard_bytes:
            self._write()
        self.held[key] = tensor.contiguous()

    def _write(self) -> None:
        self.shards.append(list(self.held))
        save_file(self.held, self.folder / f"shard-{len(self.shards)}", metadata={"format": "pt"})
        self.total += sum(tensor.nbytes for tensor in self.held.values())
        self.held = {}

    def finish(self) -> None:
        """Write the last file and the index, with the names that transformers uses."""
        self._write()
        count, file_of = len(self.shards), dict[str, str]()
        for number, keys in enumerate(self.shards, 1):
            name = WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            (self.folder / f"shard-{number}").rename(self.folder / name)
            file_of |= dict.fromkeys(keys, name)
        if count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": file_of}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
