"""What is no file is refused with its path, by all that opens files: a pipe or a device would block, or never end."""

import os
import socket

import pytest
import torch

from lightning_qlora import load_from_checkpoint
from lightning_qlora.adapters.model_folder import ModelFolder
from lightning_qlora.adapters.peft_files import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from lightning_qlora.adapters.peft_reader import read_adapter
from lightning_qlora.files.lightning_checkpoint import check_crc, read_checkpoint
from lightning_qlora.files.safetensors_folder import INDEX, WeightFolder, read_header, read_json
from lightning_qlora.tools.fake_model import meta_model
from lightning_qlora.tools.inspect_path import inspect_path
from tests.adapters.test_peft_metadata import adapter
from tests.conftest import Classifier

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and devices")


def make_socket(path):
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # a socket's path has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.fchdir(here)
    os.close(here)


KINDS = {
    "is a pipe": os.mkfifo,
    "is a socket": make_socket,
    "is a device": lambda path: path.symlink_to("/dev/zero"),
    "is a folder": lambda path: path.mkdir(),
    "is empty": lambda path: path.write_bytes(b""),
    r"is empty \(0 bytes\)": lambda path: path.symlink_to("/proc/self/mem"),
    "Too many levels of symbolic links": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize(("message", "make"), KINDS.items())
def test_what_is_no_file(message, make, tmp_path):
    for name, reads in {
        "x.json": [read_json],
        "x.safetensors": [read_header],
        "model.safetensors": [lambda path: WeightFolder(path.parent)],
        INDEX: [lambda path: WeightFolder(path.parent)],
        "config.json": [lambda path: ModelFolder.open(path.parent), lambda path: meta_model(path.parent)],
        "x.ckpt": [lambda path: load_from_checkpoint(Classifier, path), read_checkpoint, check_crc, inspect_path],
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make(path := tmp_path / name)
        for read in reads[: 1 if "folder" in message and name == "x.ckpt" else None]:
            with pytest.raises((ValueError, FileNotFoundError), match=message if name != "x.ckpt" else "") as error:
                read(path)
            assert str(path) in str(error.value)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        write_adapter(adapter(1), folder := tmp_path / name)
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(ValueError, match=message) as error:
            read_adapter(folder)
        assert str(folder / name) in str(error.value)


def test_a_file_of_a_terabyte_without_data(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"1,099,511,627,776 bytes, and at most 100,000,000 are read"):
        read_json(path)


def test_errors_of_reading_name_the_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text("{}")

    def broken(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(path), "read_text", broken)
    with pytest.raises(OSError, match=r"x\.json: could not be read \(\[Errno 5\]"):
        read_json(path)


def test_a_link_to_a_file_is_read(tmp_path):
    torch.save({"a": 1}, tmp_path / "real.ckpt")
    (tmp_path / "link.ckpt").symlink_to(tmp_path / "real.ckpt")
    assert read_checkpoint(tmp_path / "link.ckpt") == {"a": 1}
