"""FSDP2 on two processes: the same numbers as one process has, checkpoints, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import launch


def run(folder, *arguments, devices=2):
    folder.mkdir()
    return launch("tests.sharded_script", folder, *arguments, devices=devices)[1]


@pytest.mark.parametrize("loop", ["trainer", "fabric"])
@pytest.mark.parametrize("single_file", [False, True], ids=["sharded", "single file"])
def test_sharded_training_is_that_of_one_device_and_resumes_exactly(loop, single_file, tmp_path):
    ranks = run(tmp_path / "two", loop, 2, single_file)
    (alone,) = run(tmp_path / "one", loop, 1, single_file, devices=1)
    for name, value in ranks[0]["straight"].items():
        assert torch.equal(value, ranks[1]["straight"][name])
        assert torch.equal(value, ranks[0]["resumed"][name])
        torch.testing.assert_close(value, alone["straight"][name], atol=1e-4, rtol=1e-4)
    assert ranks[0]["straight"].keys() == alone["straight"].keys()
    folders = [load_file(tmp_path / place / "adapter_model.safetensors") for place in ("two/adapter0", "one/adapter0")]
    assert folders[0].keys() == folders[1].keys()
    if loop == "trainer":
        assert "another base" in ranks[0]["refused"]
        assert "4-bit + adapter" in ranks[0]["report"]
