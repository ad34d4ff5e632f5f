"""A damaged header of a safetensors file is an error of one line that names the file, whatever is changed in it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_qlora.files.safetensors_folder import read_header, write_safetensors


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
    with pytest.raises(ValueError, match="not a safetensors file, or truncated") as error:
        read_header(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


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
