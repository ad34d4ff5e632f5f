"""Attacks by files of strangers: programs in place of an index of shards, and changed bytes in every file.

Each makes some number of attempts with a seed and returns what it counted. It raises AssertionError if code ran, a
class changed, or an error is not one line that names the file.
"""

import pickle
import random
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import PurePath

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata

from lightning_qlora import convert
from lightning_qlora.adapters.peft_config import CONFIG_FILE
from lightning_qlora.adapters.peft_folder import read_adapter, write_adapter
from lightning_qlora.checkpoints.from_checkpoint import read_adapter_from_checkpoint
from lightning_qlora.files.lightning_checkpoint import read_checkpoint
from tests.adapters.test_peft_folder import adapter, content
from tests.files.test_lightning_checkpoint import STATE, save_shards

CLASSES = (Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata, _StorageInfo, torch.Size, PurePath)
OPCODES = sorted({code for code in vars(pickle).values() if isinstance(code, bytes) and len(code) == 1})
ran = []


def run(*_):
    ran.append(1)


def _text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def _name(module, attribute):
    return b"c" + f"{module}\n{attribute}\n".encode()


NAMES = (
    *(_name(kind.__module__, kind.__name__) for kind in CLASSES),
    *(_name(*pair) for pair in (("torch", "float32"), ("torch.serialization", "_get_layout"), (__name__, "run"))),
    *(_name(*pair) for pair in (("builtins", "getattr"), ("builtins", "eval"), ("copyreg", "_reconstructor"))),
    *(_text(module) + _text(name) + b"\x93" for module, name in ((__name__, "run"), ("torch", "Size.numel"))),
)
VALUES = (
    b"N",
    b"K\1",
    b"]",
    b"}",
    b")",
    b"(",
    _text("fqn"),
    _text("__class__"),
    _text("run()"),
    b"\x88",
    b"h\1",
    b"h\0",
)
STATES = (b"}", b"N}\x86", b")", b"]", b"}" + _text("fqn") + b"Ns", b"N}" + _text("name") + _text("x") + b"s\x86")
MAKERS = (
    b")R",
    b")\x81",
    b")}\x92",
    b"o",
    b"\x85R",
    b"\x86R",
    b"b",
    b"q\1",
    b"\x94",
    b"0",
    b"2",
    b"s",
    b"u",
    b"a",
    b"e",
)


def _program(draw):
    """Some opcodes: names, values, calls, states, and the memo, in an order that often makes sense."""
    code = b""
    for _ in range(draw.randint(1, 6)):
        code += draw.choice(NAMES)
        for _ in range(draw.randint(0, 3)):
            code += draw.choice([draw.choice(MAKERS), draw.choice(VALUES), draw.choice(STATES) + b"b"])
    return code


def _inserted(draw, index):
    """A pickle of an honest index with a program: before it, in it, or in place of its end."""
    code = pickle.dumps(index, protocol=draw.choice([2, 4]))
    start = 2 if code[1] == 2 else 11  # after the frame
    place = draw.choice([start, start, draw.randrange(start, len(code))])
    return code[:place] + _program(draw) + draw.choice([b"0", b"0", b"", b"1"]) + code[place:]


def programs(seed, count, folder):
    """Programs in place of an index of shards: nothing runs, no class changes."""
    draw = random.Random(seed)
    found = Counter()
    shards = save_shards(folder / "shards.ckpt", STATE, {"epoch": 3})
    index = pickle.loads((shards / ".metadata").read_bytes())
    before = [dict(vars(kind)) for kind in CLASSES]
    for number in range(count):
        (shards / ".metadata").write_bytes(_inserted(draw, index))
        found[_read(read_checkpoint, shards, f"seed {seed}, case {number}") and "read"] += 1
        assert not ran and [dict(vars(kind)) for kind in CLASSES] == before, f"seed {seed}, case {number}"
    found["refused"] = found.pop(None, 0)
    return found


def _read(read, path, case):
    """What is read; None for an error, whose text is one line that names the path."""
    try:
        return read(path) or True
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert path.name in text and "\n" not in text and len(text) < 3000, f"{case}: {text}"
        return None


def _changed(draw, code):
    changed = bytearray(code)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(changed))
        new = draw.choice([bytes([draw.randrange(256)]), draw.choice(OPCODES), b"", bytes(draw.randrange(9))])
        changed[place : place + draw.randint(0, 1)] = new
    return bytes(changed)


def bytes_of_files(seed, count, folder):
    """Changed bytes in files: an error, or all that has a checksum is as before; nothing runs, no process ends."""
    draw = random.Random(seed)
    found = Counter(refused=0)
    module = nn.Sequential(nn.Linear(64, 64))
    convert(module, r=4, checkpoint="full")
    torch.save({"state_dict": module.state_dict()}, folder / "x.ckpt")
    shards = save_shards(folder / "shards.ckpt", STATE, {"epoch": 3})
    write_adapter(adapter(1), folder / "adapter")
    files = {
        **dict.fromkeys(shards.iterdir(), (read_checkpoint, shards)),
        **dict.fromkeys((folder / "adapter").iterdir(), (read_adapter, folder / "adapter")),
        folder / "x.ckpt": (read_adapter_from_checkpoint, folder / "x.ckpt"),
    }
    before = [dict(vars(kind)) for kind in CLASSES]
    for number in range(count):
        path = draw.choice(sorted(files))
        read, place = files[path]
        honest = path.read_bytes()
        path.write_bytes(_changed(draw, honest))
        value = _read(read, place, f"seed {seed}, case {number}, {path.name}")
        same = path.read_bytes() == honest
        if value is not None and read is read_adapter and path.name != CONFIG_FILE and not same:
            assert content(value) == content(adapter(1)), f"seed {seed}, case {number}"
        found["refused" if value is None else "read"] += 1
        path.write_bytes(honest)
        assert [dict(vars(kind)) for kind in CLASSES] == before, f"seed {seed}, case {number}"
    with suppress(OSError):
        shutil.rmtree(shards)
    return found
