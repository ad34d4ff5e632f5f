"""Checksums of the entries of a state dict: damaged values are refused when they are loaded.

A plain loop needs them: `torch.load` does not compare the CRC-32 in its file, so a changed bit changes an adapter.
A module in shards (FSDP2) has none, since torch.distributed.checkpoint loads only files with the entries that the
module has now. `files.lightning_checkpoint.check_crc` compares the shards with the CRC-32 that is in them.
"""

import json
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.adapters.adapter import ADAPTER_DTYPES, MAGNITUDE
from lightning_qlora.checks import shown
from lightning_qlora.layers.dotted_names import last_part
from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.fingerprint import checksum
from lightning_qlora.layers.layer_state import FINGERPRINT
from lightning_qlora.layers.lora_layer import ADAPTER

CHECKSUMS_KEY = "qlora_checksums"  # key of a JSON object in a uint8 tensor: key -> `layers.fingerprint.checksum`

# Last part of a key -> its dimensions and types.
EXPECTED = {
    **dict.fromkeys(ADAPTER, (2, ADAPTER_DTYPES)),
    MAGNITUDE: (1, ADAPTER_DTYPES),
    FINGERPRINT: (0, (torch.int64,)),
}


def add_checksums(state_dict: dict[str, Any], prefix: str) -> None:
    """Add the checksums of all entries of a module, as the last one."""
    entries = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
    if any(is_sharded(value) or getattr(value, "is_meta", False) for value in entries.values()):
        return
    sums = {key.removeprefix(prefix): checksum(value) for key, value in entries.items() if _is_plain(value)}
    state_dict[prefix + CHECKSUMS_KEY] = torch.tensor(list(json.dumps(sums).encode()), dtype=torch.uint8, device="cpu")


def check_checksums(state_dict: dict[str, Any], prefix: str, source: str = "the checkpoint") -> None:
    """Remove the checksums from a state dict, and raise ValueError if they, or an entry, are damaged.

    The error names the file, if it is known, and the key. Missing entries are no error here.
    """
    for key, value in state_dict.items():
        dimensions, types = EXPECTED.get(last_part(str(key)), (None, ()))
        kind = [getattr(value, name, None) for name in ("dtype", "ndim", "layout")]
        if dimensions is not None and (kind[0] not in types or kind[1:] != [dimensions, torch.strided]):
            kinds = str(types[0]).removeprefix("torch.")
            what = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise ValueError(
                f"{source}: {key!r} is {what}, and must have a type as {kinds} in {dimensions} dimensions."
            )
    held = state_dict.pop(prefix + CHECKSUMS_KEY, None)
    if held is None:
        return
    try:
        sums: dict[str, str] = dict(json.loads(bytes(held.contiguous().tolist())))
    except Exception as error:  # a value of another type raises any
        raise ValueError(
            f"{source}: {prefix + CHECKSUMS_KEY!r} is damaged ({error}). Use another copy of it."
        ) from error
    for key, expected in sums.items():
        # contiguous() loads the tensors of Lightning's lazily loaded checkpoints.
        value = state_dict[prefix + key].contiguous() if prefix + key in state_dict else None
        found = checksum(value) if value is not None and _is_plain(value) else expected
        if found != expected:
            raise ValueError(
                f"{source}: {prefix + key!r} is not what was saved: its checksum is {found}, and was {expected}. The "
                "file is damaged: use another copy. If the value was changed on purpose, remove the "
                f"entry {prefix + CHECKSUMS_KEY!r}."
            )


def _is_plain(value: Any) -> bool:
    """Whether a value is an ordinary tensor, and not of another class or layout, whose bytes are not the values."""
    return type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
