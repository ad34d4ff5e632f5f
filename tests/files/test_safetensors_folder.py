"""A damaged header of a safetensors file is an error of one line that names the file, whatever is changed in it."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_qlora.files.safetensors_folder import (
    INDEX,
    WeightFolder,
    open_safetensors,
    read_header,
    write_safetensors,
)
from tests.conftest import raises_in_one_line


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"data_offsets":[0,48]', b'"data_offsets":[0.48]'),  # a list of one number
        (b'"data_offsets":[0,48]', b'"data_offsets":{"0":1}'),
        (b'"data_offsets":[0,48]', b'"data_offsets":["",48]'),
        (b'"data_offsets":[0,48]', b'"data_offsetz":[0,48]'),
        (b'"w":{', b'"w":['),
    ],
    ids=str,
)
def test_a_damaged_header_is_one_line(old, new, tmp_path):
    save_file({"w": torch.ones(3, 4)}, path := tmp_path / "x.safetensors")
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with raises_in_one_line(ValueError, rf"^{re.escape(str(path))}: not a safetensors file, or truncated"):
        read_header(path)


def test_keys_and_metadata_of_any_language_are_written_and_read(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors({"schicht.größe": torch.ones(2), "層": torch.zeros(3)}, path, {"b": "é", "a": "層"})
    entries, metadata = read_header(path)
    assert entries.keys() == {"schicht.größe", "層"} and metadata == {"b": "é", "a": "層"}
    assert torch.equal(load_file(path)["schicht.größe"], torch.ones(2))
    kinds = (torch.bool, torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64)
    tensors = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in kinds} | {"scalar": torch.tensor(1.0)}
    write_safetensors(tensors, path, {})
    entries, _ = read_header(path)
    assert {key: (entry.shape, entry.nbytes) for key, entry in entries.items()} == {
        key: (tuple(value.shape), value.nbytes) for key, value in tensors.items()
    }


def test_a_tensor_that_a_file_lacks_is_named_with_the_file(tmp_path):
    save_file({"w": torch.ones(3, 4)}, path := tmp_path / "x.safetensors")
    with raises_in_one_line(ValueError, rf"^{re.escape(str(path))}: .*other"), open_safetensors(path) as file:
        file.get_tensor("other")


def test_a_folder_of_shards_and_a_wrong_index(tmp_path):
    first = tmp_path / "b.safetensors"
    second = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(2), "y": torch.zeros(1)}, first)
    save_file({"x.absmax": torch.ones(1), "z": torch.full((1,), 3.0)}, second)
    file_of = {"x": first, "y": first, "x.absmax": second, "z": second}

    def opened(**changes):
        names = {key: path.name for key, path in file_of.items()} | changes
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
        return WeightFolder(tmp_path)

    folder = opened()
    assert folder.file_of == file_of and folder.files() == [second, first]
    assert {key: entry.shape for key, entry in folder.entries.items()} == {
        "x": (2,), "y": (1,), "x.absmax": (1,), "z": (1,)
    }  # fmt: skip
    values = {key: tensor.tolist() for key, tensor in folder.tensors(["z", "x"]).items()}
    assert values == {"z": [3.0], "x": [1.0, 1.0]}
    assert folder.is_packed("x") and not folder.is_packed("y")
    for changes, message in (
        ({"x": "a.safetensors"}, rf"a\.safetensors: has no tensor 'x', though {INDEX} says so"),
        ({"w": ""}, "the file of 'w' is '', which is not a file of this folder"),
    ):
        with raises_in_one_line(ValueError, message):
            opened(**changes)
    (tmp_path / INDEX).unlink()
    for number in range(7):
        (tmp_path / f"w{number}.bin").touch()
    names = r"\['w0\.bin', 'w1\.bin', 'w2\.bin', 'w3\.bin', 'w4\.bin'\]"
    with raises_in_one_line(FileNotFoundError, rf"has neither model\.safetensors nor {INDEX}, only {names}"):
        WeightFolder(tmp_path)
