"""The metadata of adapter_model.safetensors that PEFT does not write and does not read.

The checksums of the tensors and of the other entries are checked if the file has them.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.layers.fingerprint import checksum, fingerprint_of_weight

QUANTIZATION = "lightning_qlora"  # how the base was quantized and the adapters were initialized: `quantization_of`
FINGERPRINTS = "lightning_qlora_base"  # of the 4-bit weights that the initialization changed
EXPERTS = "lightning_qlora_experts"  # `Adapter.experts`
CHECKSUMS_OF_FILE = "lightning_qlora_checksums"
METADATA_KEY = "__metadata__"  # safetensors' name of the metadata: the key of their own checksum


def metadata_of(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata for an adapter and its tensors as they are written."""
    entries: dict[str, Any] = {
        QUANTIZATION: adapter.quantization,
        FINGERPRINTS: {name: fingerprint_of_weight(weight) for name, weight in adapter.bases.items()},
        EXPERTS: adapter.experts,
    }
    metadata = {"format": "pt"}
    metadata |= {key: json.dumps(value) for key, value in entries.items() if value}
    metadata[CHECKSUMS_OF_FILE] = json.dumps(_checksums(tensors, metadata), sort_keys=True)
    return metadata


def metadata_entry(metadata: Mapping[str, str], key: str) -> dict[str, Any] | None:
    """An object that `metadata_of` stored; None if the file does not have it."""
    if key not in metadata:
        return None
    try:
        entry = json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata {key!r} is not valid JSON ({error}). Copy or save it again.") from error
    if not isinstance(entry, dict):
        raise ValueError(f"its metadata {key!r} is {str(entry)[:80]!r}, not an object. Copy or save it again.")
    return entry


def check_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise ValueError, with the key, if a tensor is missing, or one or the metadata has another checksum."""
    expected = metadata_entry(metadata, CHECKSUMS_OF_FILE)
    if expected is None:
        return
    checksums = _checksums(tensors, {key: text for key, text in metadata.items() if key != CHECKSUMS_OF_FILE})
    for key in sorted(expected.keys() | checksums.keys(), key=lambda key: (key != METADATA_KEY, key)):
        if expected.get(key) != checksums.get(key):
            raise ValueError(
                f"{key!r} is not what was saved (its checksum is {checksums.get(key)}, and was "
                f"{expected.get(key)}). The file is damaged: copy it again, or save the adapter again."
            )


def _checksums(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    text = json.dumps(dict(metadata), sort_keys=True)
    checksums = {key: checksum(tensor) for key, tensor in tensors.items()}
    checksums[METADATA_KEY] = checksum(torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu"))
    return checksums
