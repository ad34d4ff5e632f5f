"""A model in files of a largest size."""

import torch

from lightning_qlora.files.safetensors_folder import WeightFolder
from lightning_qlora.files.shard_writer import ShardWriter


def test_shards_have_an_index(tmp_path):
    writer = ShardWriter(tmp_path, shard_bytes=100)
    for number in range(3):
        writer.add(f"w{number}", torch.full((20,), float(number)))
    writer.finish()
    found = WeightFolder(tmp_path)
    assert len(found.files()) == 3 and torch.equal(found.tensors(["w2"])["w2"], torch.full((20,), 2.0))
