"""Compares adapter folders."""

import torch
from safetensors.torch import load_file


def assert_same_folders(first, second):
    """Safetensors writes metadata in no fixed order, so the bytes of the files may differ."""
    assert (first / "adapter_config.json").read_text() == (second / "adapter_config.json").read_text()
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
