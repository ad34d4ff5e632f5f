"""Reads and compares adapter folders."""

import json
from dataclasses import replace

import torch
from safetensors.torch import load_file

from lightning_qlora.adapters.save import get_adapter
from lightning_qlora.survey.parts import Parts

PLAIN = {  # entries of adapter_config.json without dropout, patterns, rsLoRA and DoRA
    "peft_type": "LORA",
    "lora_dropout": 0.0,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "bias": "none",
}


def adapter_of(module, **arguments):
    """With the fingerprints that a checkpoint has."""
    parts = Parts.of(module)
    adapter = get_adapter(parts, **arguments)
    if adapter.quantization is None:  # for the base in 16 bits
        return adapter
    numbers = {name: layer.base_fingerprint() for name, layer in parts.base.layers.items()}
    return replace(adapter, fingerprints=numbers)


def read_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def assert_same_folders(first, second):
    """To the byte, with our metadata: how the base was quantized, fingerprints and checksums."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def assert_same_tensors(first, second):
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
