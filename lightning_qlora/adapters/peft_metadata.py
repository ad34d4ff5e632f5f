"""What the metadata of adapter_model.safetensors hold beside PEFT's format; PEFT ignores them.

The checksums of the tensors and of the other entries are checked if the file has them: PEFT writes none.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.layers.fingerprint import checksum, fingerprint_of_weight

# How the base was quantized and the adapters were initialized (`quantization_of`); fingerprints of the 4-bit weights
# that the initialization changed; `Adapter.experts`; checksums.
QUANTIZATION, FINGERPRINTS, EXPERTS = "lightning_qlora", "lightning_qlora_base", "lightning_qlora_experts"
CHECKSUMS_OF_FILE = "lightning_qlora_checksums"
METADATA_KEY = "__metadata__"  # safetensors' name of the metadata: the key of their own checksum


def metadata_of(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata for an adapter and its tensors as they are written."""
    entries: dict[str, Any] = {
        QUANTIZATION: adapter.quantization,
        FINGERPRINTS: {name: fingerprint_of_weight(weight) for name, weight in adapter.bases.items()},
        EXPERTS: adapter.experts,
    }
    metadata = {"format": "pt", **{key: json.dumps(value) for key, value in entries.items() if value}}
    sums = {key: checksum(tensor) for key, tensor in tensors.items()}
    return metadata | {
        CHECKSUMS_OF_FILE: json.dumps(sums | {METADATA_KEY: _checksum_of_text(metadata)}, sort_keys=True)
    }


def metadata_entry(metadata: Mapping[str, str], key: str) -> dict[str, Any] | None:
    """An object that `metadata_of` stored; None if the file does not have it."""
    if key not in metadata:
        return None
    try:
        found = json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata {key!r} is not valid JSON ({error}). Copy or save it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"its metadata {key!r} is {str(found)[:80]!r}, not an object. Copy or save it again.")
    return found


def check_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise ValueError, with the key, if a tensor is missing, or one or the metadata has another checksum."""
    expected = metadata_entry(metadata, CHECKSUMS_OF_FILE)
    if expected is None:
        return
    found = {key: checksum(tensor) for key, tensor in tensors.items()}
    found[METADATA_KEY] = _checksum_of_text({key: text for key, text in metadata.items() if key != CHECKSUMS_OF_FILE})
    for key in sorted(expected.keys() | found.keys(), key=lambda key: (key != METADATA_KEY, key)):
        if expected.get(key) != found.get(key):
            raise ValueError(
                f"{key!r} is not what was saved (its checksum is {found.get(key)}, and was "
                f"{expected.get(key)}). The file is damaged: copy it again, or save the adapter again."
            )


def _checksum_of_text(metadata: Mapping[str, str]) -> str:
    text = json.dumps(dict(metadata), sort_keys=True)
    return checksum(torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu"))
