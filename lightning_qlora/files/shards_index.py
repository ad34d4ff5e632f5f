"""The index of a checkpoint in shards (torch's `Metadata`), from a pickle that anybody may have written.

A pickle is a program, which calls what it names. Here its opcodes make plain values alone: a class or a function stays
a `Name`, and what the pickle would make with it is a `Call`, which holds its arguments and state. Then this file makes
torch's objects, once the types and sizes of all values are those of an index, and the shards are as large as it says.
"""

import io
import math
import pickle
import reprlib
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_qlora.checks import shown
from lightning_qlora.files.hub import check_name, file_in

# What torch.distributed.checkpoint names in an index, beside dtypes and the path of the folder.
OF_METADATA = (
    *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
    *("TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
)
NAMES = {
    *((Metadata.__module__, name) for name in OF_METADATA),
    (_StorageInfo.__module__, _StorageInfo.__name__),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}
SYSTEMS = ("pathlib", "pathlib._local")  # of a path of any system, from any Python
# What a pickle of protocols 2 to 5 needs for an index. The others make objects, or are of older protocols.
OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK),
    *(pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL),
)
PYTHONS: Any = vars(pickle)["_Unpickler"]  # that of C has no table of opcodes, and allocates 32 GB on damaged bytes
MOST_DIMENSIONS = 64
MOST_DEPTH = 64  # of the dicts and lists that hold the values


class Name(NamedTuple):
    """A class, function or dtype that a pickle names."""

    module: str
    name: str


class Call:
    """What a pickle would make by a call."""

    __slots__ = ("arguments", "built", "name")

    def __init__(self, name: Name, arguments: tuple[Any, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.built: Any = None

    def __repr__(self) -> str:
        return f"a {self.name.module}.{self.name.name}"


class _Unpickler(PYTHONS):  # type: ignore[misc]
    """Makes plain values, and `Name` and `Call` in place of all others."""

    dispatch: ClassVar[dict[int, Any]] = {code[0]: PYTHONS.dispatch[code[0]] for code in OPCODES}

    def find_class(self, module: str, name: str) -> Name:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if is_dtype or module in SYSTEMS or (module, name) in NAMES:
            return Name(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} does not belong into an index of shards")

    def load_call(self) -> None:
        arguments = self.stack.pop()
        name = self.stack[-1]
        _check(type(name) is Name and type(arguments) is tuple, "a call", name)
        self.stack[-1] = Call(name, arguments)

    dispatch[pickle.REDUCE[0]] = load_call
    dispatch[pickle.NEWOBJ[0]] = load_call

    def load_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        _check(type(made) is Call and made.built is None, "an object without a state", made)
        made.built = state

    dispatch[pickle.BUILD[0]] = load_build

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        _check(type(target) is dict and len(items) % 2 == 0, "a dict", target)
        for key in items[::2]:
            _check(type(key) is str or type(key) is Call, "a key", key)  # nested tuples have no end for hash()
        target.update(zip(items[::2], items[1::2], strict=True))

    def load_setitem(self) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._set(items)

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def read_index(path: Path) -> Metadata:
    """The index in a file. UnpicklingError or ValueError if it is none, or does not fit the files beside it."""
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except KeyError as error:
        raise pickle.UnpicklingError(f"opcode {error} does not belong into an index of shards") from error
    fields = _state(found, Metadata)
    tensors = _dict_of(fields["state_dict_metadata"], str)
    places = _dict_of(fields["storage_data"], Call)
    paths = fields["planner_data"]
    index = Metadata(
        {key: _entry(value) for key, value in tensors.items()},
        None if paths is None else _checked_paths(_dict_of(paths, str)),
        {_key(key): _place(value) for key, value in places.items()},
    )
    _check_sizes(index, path.parent)
    return index


def _check(good: bool, expected: str, value: Any) -> None:
    if not good:
        # A list may hold itself many times, and its whole text has no end.
        raise ValueError(f"the index of shards has {reprlib.repr(value)} in place of {expected}")


def _state(value: Any, kind: type) -> dict[str, Any]:
    """The attributes of what stands for an object of a class; None for those that it does not have."""
    good = type(value) is Call and value.name == (kind.__module__, kind.__name__) and value.arguments == ()
    _check(good and type(value.built) in (dict, type(None)), f"a {kind.__name__}", value)
    state = defaultdict[str, Any](type(None))
    state.update(value.built or {})
    return state


def _dict_of(value: Any, keys: type) -> dict[Any, Any]:
    _check(type(value) is dict and all(type(key) is keys for key in value), f"a dict by {keys.__name__}", value)
    return value  # type: ignore[no-any-return]


def _sizes(value: Any) -> torch.Size:
    good = type(value) is Call and value.name == ("torch", "Size") and len(value.arguments) == 1
    _check(good, "a torch.Size", value)
    (sizes,) = value.arguments
    _check(type(sizes) is tuple and len(sizes) <= MOST_DIMENSIONS, "sizes", sizes)
    for size in sizes:
        _check(_is_count(size), "a size", size)
    return torch.Size(sizes)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _entry(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(value) is Call and value.name.name == BytesStorageMetadata.__name__:
        _state(value, BytesStorageMetadata)
        return BytesStorageMetadata()
    fields = _state(value, TensorStorageMetadata)
    chunks = fields["chunks"]
    _check(type(chunks) is list, "a list of chunks", chunks)
    made = []
    for chunk in chunks:
        of_chunk = _state(chunk, ChunkStorageMetadata)
        made.append(ChunkStorageMetadata(_sizes(of_chunk["offsets"]), _sizes(of_chunk["sizes"])))
    return TensorStorageMetadata(TensorProperties(_dtype(fields["properties"])), _sizes(fields["size"]), made)


def _dtype(properties: Any) -> torch.dtype:
    """The first value of the state of TensorProperties, which is a tuple. The others are deprecated."""
    _check(type(properties) is Call and properties.name.name == "TensorProperties", "properties", properties)
    first, *_ = properties.built if type(properties.built) is tuple and properties.built else (None,)
    dtype: Any = None
    if type(first) is Name and first.module == "torch":
        dtype = vars(torch)[first.name]
    _check(isinstance(dtype, torch.dtype), "a data type", first)
    return dtype  # type: ignore[no-any-return]


def _key(value: Any) -> MetadataIndex:
    fields = _state(value, MetadataIndex)
    name = fields["fqn"]
    place = fields["index"]
    offset = fields["offset"]
    _check(type(name) is str and (place is None or _is_count(place)), "a key of the index", name)
    return MetadataIndex(name, None if offset is None else _sizes(offset), place)


def _place(value: Any) -> _StorageInfo:
    fields = _state(value, _StorageInfo)
    name = fields["relative_path"]
    offset = fields["offset"]
    length = fields["length"]
    check_name("a shard", name)
    _check(_is_count(offset) and _is_count(length), "a place in a shard", (offset, length))
    _check(not fields["transform_descriptors"], "bytes as torch.save writes them", value)
    return _StorageInfo(name, offset, length)


def _checked_paths(paths: dict[str, Any]) -> dict[str, tuple[str | int, ...]]:
    """Where each value is in the nested dicts and lists; lists get as many elements as the largest number says."""
    most: dict[tuple[Any, ...], int] = defaultdict(int)
    for path in paths.values():
        good = type(path) is tuple and 0 < len(path) <= MOST_DEPTH
        good = good and all(type(part) is str or _is_count(part) for part in path)
        _check(good, "the place of a value", path)
        for end, part in enumerate(path):
            if type(part) is int:
                most[path[:end]] = max(most[path[:end]], part)
    _check(sum(most.values()) <= 1000 + 10 * len(paths), "lists of the values that it has", sum(most.values()))
    return paths


def _check_sizes(index: Metadata, folder: Path) -> None:
    """ValueError for values that are larger than their bytes in the shards, or than the shards."""
    lengths: dict[str, int] = defaultdict(int)
    for place in index.storage_data.values():
        lengths[place.relative_path] += place.length
    for name, length in lengths.items():
        size = file_in(folder, name).stat().st_size
        _check(length <= size, f"at most the {size} bytes of {name}", length)
    for key, tensor in index.state_dict_metadata.items():
        if isinstance(tensor, TensorStorageMetadata):
            _check_chunks(index, key, tensor)


def _check_chunks(index: Metadata, key: str, tensor: TensorStorageMetadata) -> None:
    itemsize = tensor.properties.dtype.itemsize
    count = 0
    for chunk in tensor.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(tensor.size)
        inside = inside and all(map(lambda a, b, c: a + b <= c, chunk.offsets, chunk.sizes, tensor.size))
        place = index.storage_data.get(MetadataIndex(key, chunk.offsets))
        numel = math.prod(chunk.sizes)
        fits = numel == 0 or (place is not None and numel * itemsize <= place.length)
        _check(inside and fits, f"a part of {shown(key)}", list(chunk.sizes))
        count += numel
    _check(count == math.prod(tensor.size), f"all parts of {shown(key)}", f"{count} elements")
