"""A pickle in place of an index of shards runs no code and changes no class, whatever its opcodes say."""

import copyreg
import io
import pickle
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import PurePath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_qlora.files import shards_index
from lightning_qlora.files.lightning_checkpoint import is_shards, read_checkpoint
from tests.conftest import raises_in_one_line
from tests.files.test_lightning_checkpoint import STATE, save_shards
from tests.toys import assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
METADATA = "torch.distributed.checkpoint.metadata"
CLASSES = (Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata, _StorageInfo, torch.Size, PurePath)
ran = []


def run(*_):
    ran.append(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = save_shards(tmp_path_factory.mktemp("saved") / "shards.ckpt", STATE, {"epoch": 3})
    return folder, (folder / ".metadata").read_bytes()


@pytest.fixture
def index(saved):
    return pickle.loads(saved[1])


@pytest.fixture
def read(saved):
    """Reads the checkpoint with other bytes, or another object, as its index."""

    def read_with(content):
        folder, _ = saved
        (folder / ".metadata").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
        return read_checkpoint(folder)

    return read_with


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module, attribute):
    return b"c" + f"{module}\n{attribute}\n".encode()


def slots(key="name", value="x"):
    return b"N}" + text(key) + text(value) + b"s\x86b"  # BUILD with (None, {key: value}), which calls setattr


def state(key="name", value="x"):
    return b"}" + text(key) + text(value) + b"sb"


INSTANCE = name(METADATA, "MetadataIndex") + b")\x81"
RUN = name("tests.files.test_shards_index", "run")
# What stands before an honest index, and is popped; each leaves one value on the stack.
GADGETS = {
    "an attribute of a class": name(METADATA, "Metadata") + slots(),
    "an attribute of a frozen class": name(METADATA, "MetadataIndex") + slots("__hash__"),
    "an attribute of a function": name("torch.serialization", "_get_layout") + slots("__code__"),
    "an attribute of a dtype": name("torch", "float32") + slots("itemsize"),
    "an attribute of torch.Size": name("torch", "Size") + slots("numel"),
    "an attribute of a member of an enum": name(METADATA, "_MEM_FORMAT_ENCODING") + b"K\0\x85R" + slots("value"),
    "code by REDUCE": RUN + b")R",
    "code by NEWOBJ": RUN + b")\x81",
    "code by NEWOBJ_EX": RUN + b")}\x92",
    "code by OBJ": b"(" + RUN + b"o",
    "code by INST": b"(itests.files.test_shards_index\nrun\n",
    "code by STACK_GLOBAL": text("tests.files.test_shards_index") + text("run") + b"\x93)R",
    "code by a dotted name": text("torch.serialization") + text("os.system") + b"\x93" + text("true") + b"\x85R",
    "code by a dotted name of a class": text(METADATA) + text("Metadata.__init__") + b"\x93)R",
    "code by an extension": b"\x82\x7b)R",
    "code by a persistent id": text("a") + b"Q",
    "code by builtins": name("builtins", "eval") + text("run()") + b"\x85R",
    "getattr": name("builtins", "getattr") + text("a") + text("home") + b"\x86R",
}  # fmt: skip


@pytest.mark.parametrize("gadget", GADGETS)
def test_a_gadget_is_refused_and_changes_nothing(gadget, index, read, monkeypatch):
    monkeypatch.setitem(copyreg._inverted_registry, 0x7B, ("tests.files.test_shards_index", "run"))
    before = [dict(vars(kind)) for kind in CLASSES]
    ran.clear()
    for protocol in (2, 4):
        honest = pickle.dumps(index, protocol=protocol)
        with raises_in_one_line(ValueError, "shards.ckpt: "):
            read(honest[:2] + GADGETS[gadget] + b"0" + honest[2:])
    assert not ran
    assert [dict(vars(kind)) for kind in CLASSES] == before


@pytest.mark.parametrize(
    "value",
    [b"N", b"}", name("torch", "float32"), INSTANCE, name(METADATA, "Metadata") + b")\x81", name("pathlib", "os")],
)
def test_what_is_no_index_is_refused(value, read):
    with raises_in_one_line(ValueError, "shards.ckpt: "):
        read(b"\x80\2" + value + b".")


def changed(index, key="state_dict.w", **values):
    index.state_dict_metadata[key] = replace(index.state_dict_metadata[key], **values)


def part(*sizes, offsets=None):
    return ChunkStorageMetadata(torch.Size(offsets or [0] * len(sizes)), torch.Size(sizes))


def of_values(index, key="state_dict.w"):
    return next(place for at, place in index.storage_data.items() if at.fqn == key)


LARGE = 1 << 40
CHANGES = {
    "a large tensor": lambda index: changed(index, size=torch.Size([LARGE]), chunks=[part(LARGE)]),
    "a large tensor without parts": lambda index: changed(index, size=torch.Size([LARGE]), chunks=[]),
    "a part is missing": lambda index: changed(index, chunks=[]),
    "a part beyond the tensor": lambda index: changed(index, chunks=[part(3, 4, offsets=[1, 0])]),
    "a part of other dimensions": lambda index: changed(index, chunks=[part(12)]),
    "a type that is none": lambda index: changed(index, properties=TensorProperties("float32")),
    "chunks that are none": lambda index: changed(index, chunks=[None]),
    "a tensor that is nowhere": lambda index: index.state_dict_metadata.update(
        a=TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([1]), [part(1)])
    ),
    "a long value": lambda index: setattr(of_values(index), "length", LARGE),
    "a negative place": lambda index: setattr(of_values(index), "offset", -1),
    "a shard elsewhere": lambda index: setattr(of_values(index), "relative_path", "../x"),
    "a shard of another computer": lambda index: setattr(of_values(index), "relative_path", "\\\\host\\share"),
    "a shard of another drive": lambda index: setattr(of_values(index), "relative_path", "c:x"),
    "a shard that is missing": lambda index: setattr(of_values(index), "relative_path", "x.distcp"),
    "a shard that is no text": lambda index: setattr(of_values(index), "relative_path", b"x"),
    "many values of the same bytes": lambda index: index.storage_data.update(
        {MetadataIndex(f"x{n}", torch.Size([0])): of_values(index) for n in range(99)}
    ),
    "a long list": lambda index: index.planner_data.update({"state_dict.w": ("a", LARGE)}),
    "many long lists": lambda index: index.planner_data.update({f"x{n}": ("a", n, 99) for n in range(99)}),
    "places that are none": lambda index: setattr(index, "planner_data", ["a"]),
    "no tensors": lambda index: setattr(index, "state_dict_metadata", None),
    "no places": lambda index: setattr(index, "storage_data", None),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_values_that_do_not_fit_are_refused_before_they_take_memory(change, index, read):
    CHANGES[change](index)
    with raises_in_one_line((ValueError, FileNotFoundError), "shards.ckpt"):
        read(index)


def test_memo_numbers_and_lengths_take_no_memory(read):
    for code in (b"Nr\xff\xff\xff\x7f", b"X\xff\xff\xff\x7fa", b"\x95" + b"\xff" * 7 + b"\x7f", b"\x8a\xff" + b"a"):
        with raises_in_one_line(ValueError, "shards.ckpt: "):
            read(b"\x80\4" + code + b".")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_honest_index_is_read_from_each_protocol(protocol, index, read, saved):
    content = read(pickle.dumps(index, protocol=protocol))
    assert_equal(content["state_dict"], STATE["state_dict"])
    assert (content["groups"], content["epoch"]) == (STATE["groups"], 3)
    found = shards_index.read_index(saved[0] / ".metadata", weights_only=True)
    assert any(isinstance(value, BytesStorageMetadata) for value in index.state_dict_metadata.values())
    assert found.storage_data == index.storage_data
    assert found.state_dict_metadata == index.state_dict_metadata
    assert found.planner_data == index.planner_data


def test_what_no_shard_has_is_zero(index, read, saved):
    """Of parts that overlap, so that their sizes are right: it would be what was in memory before."""
    folder, _ = saved
    first = of_values(index)
    changed(index, chunks=[part(2, 4), part(1, 4, offsets=[1, 0])])
    index.storage_data = {at: place for at, place in index.storage_data.items() if at.fqn != "state_dict.w"}
    with open(folder / first.relative_path, "ab") as file:
        for offsets, value in (((0, 0), torch.ones(2, 4)), ((1, 0), torch.ones(1, 4))):
            begin = file.tell()
            torch.save(value.to(torch.bfloat16), file)
            index.storage_data[MetadataIndex("state_dict.w", offsets)] = _StorageInfo(
                first.relative_path, begin, file.tell() - begin
            )
    junk = [torch.full((3, 4), 7.0, dtype=torch.bfloat16) for _ in range(100)]
    del junk
    assert read(index)["state_dict"]["w"].tolist() == [[1.0] * 4] * 2 + [[0.0] * 4]


@given(st.data())
def test_changed_bytes_are_refused_or_read_as_an_index(data):
    """Of any bytes of an honest index, by others, or by opcodes; no class changes."""
    index = Metadata(
        {"a": TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([0]), [part(0)])},
        {"a": ("a", 0)},
        {MetadataIndex("a", [0], 0): _StorageInfo("x", 0, 0)},
    )
    content = bytearray(pickle.dumps(index, protocol=data.draw(st.sampled_from([2, 4]))))
    opcodes = st.sampled_from(sorted({code[0] for code in vars(pickle).values() if isinstance(code, bytes) and code}))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 1))] = [data.draw(opcodes | st.integers(0, 255))]
    before = [dict(vars(kind)) for kind in CLASSES]
    with suppress(Exception):  # of any type: the file is damaged
        shards_index._Unpickler(io.BytesIO(bytes(content))).load()
    assert [dict(vars(kind)) for kind in CLASSES] == before


def test_links_of_shards_stay_in_the_folder(tmp_path):
    folder = save_shards(tmp_path / "shards.ckpt", STATE, {"epoch": 3})
    shard = next(folder.glob("*.distcp"))
    for name in (shard.name, "meta.pt", ".metadata"):
        (folder / name).rename(tmp_path / "elsewhere")
        (folder / name).symlink_to("../elsewhere")
        assert is_shards(folder)
        with raises_in_one_line(ValueError, r"is a symbolic link to .*elsewhere, outside of the folder"):
            read_checkpoint(folder)
        (folder / name).unlink()
        (tmp_path / "elsewhere").rename(folder / name)
    shard.rename(folder / "b")
    shard.symlink_to("b")
    assert read_checkpoint(folder)["epoch"] == 3
