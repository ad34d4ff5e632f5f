"""The index of a checkpoint in shards (torch's `Metadata`), from a pickle that anybody may have written.

Python's unpickler, which may make the classes of an index alone; torch's `weights_only` does not know the protocol in
which torch writes an index. Then names and sizes are compared with the files.
"""

import math
import pickle
from collections import defaultdict
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.serialization import _get_layout

from lightning_qlora.checks import shown
from lightning_qlora.files.hub import check_name, file_in

CLASSES = (
    *(metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata, Metadata, MetadataIndex, metadata.StorageMeta),
    *(metadata.TensorProperties, TensorStorageMetadata, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo),
)
NAMES: dict[tuple[str, str], Any] = {(each.__module__, each.__name__): each for each in CLASSES}
NAMES |= {("torch.serialization", "_get_layout"): _get_layout, ("torch", "Size"): torch.Size}
PYTHONS: Any = vars(pickle)["_Unpickler"]  # that of C allocates 32 GB on damaged bytes


class _Unpickler(PYTHONS):  # type: ignore[misc]
    dispatch: ClassVar[dict[int, Any]] = dict(PYTHONS.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local"):  # the folder of before, a path of any system: nobody needs it
            return lambda *_: None
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if (module, name) not in NAMES:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} does not belong into an index of shards")
        return NAMES[module, name]

    def load_build(self) -> None:
        """Python's sets attributes of anything, also of a class."""
        if not is_dataclass(self.stack[-2]) or isinstance(self.stack[-2], type):
            raise pickle.UnpicklingError("a state of what has none")
        PYTHONS.load_build(self)

    dispatch[pickle.BUILD[0]] = load_build


def read_index(path: Path, weights_only: bool) -> Metadata:
    """The index in a file; weights_only=False runs code in its pickle.

    Raises an error of any type if it is none, or does not fit the files beside it.
    """
    with path.open("rb") as file:
        index: Metadata = (_Unpickler if weights_only else pickle.Unpickler)(file).load()
    _check(type(index) is Metadata, "is no torch Metadata")
    lengths: dict[str, int] = defaultdict(int)
    for place in index.storage_data.values():
        check_name("a shard", place.relative_path)
        _check(place.offset >= 0 and place.length >= 0, "has a place before the beginning of a shard")
        lengths[place.relative_path] += place.length
    for name, length in lengths.items():
        _check(length <= file_in(path.parent, name).stat().st_size, f"has more bytes than {name}")
    for key, tensor in index.state_dict_metadata.items():
        if isinstance(tensor, TensorStorageMetadata):
            _check_parts(index, key, tensor)
    _check_lists(index.planner_data or {})
    return index


def _check(good: bool, text: str) -> None:
    if not good:
        raise ValueError(f"the index of shards {text}")


def _check_parts(index: Metadata, key: str, tensor: TensorStorageMetadata) -> None:
    """The parts of a tensor are inside of it, have all of its elements, and their bytes are in a shard."""
    numel = 0
    for part in tensor.chunks:
        place = index.storage_data.get(MetadataIndex(key, part.offsets))
        nbytes = math.prod(part.sizes) * tensor.properties.dtype.itemsize
        edges = zip(part.offsets, part.sizes, tensor.size, strict=True)
        inside = all(begin >= 0 and size >= 0 and begin + size <= end for begin, size, end in edges)
        _check(inside and nbytes <= (place.length if place else 0), f"has other sizes than the parts of {shown(key)}")
        numel += math.prod(part.sizes)
    _check(numel == math.prod(tensor.size), f"has not all parts of {shown(key)}")


def _check_lists(paths: dict[str, tuple[str | int, ...]]) -> None:
    """Lists of the checkpoint, which torch makes as long as the largest number in the paths of their values."""
    lengths: dict[tuple[Any, ...], int] = defaultdict(int)
    for path in paths.values():
        for end, part in enumerate(path):
            if isinstance(part, int):
                lengths[path[:end]] = max(lengths[path[:end]], part)
    _check(sum(lengths.values()) <= 1000 + 10 * len(paths), "has longer lists than values")
