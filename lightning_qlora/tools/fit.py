"""Whether a run fits on a GPU, and what each of several devices holds: `plan --gpu-memory`, `plan --devices`."""

import re
from typing import Any

from lightning_qlora.config import QLoRAConfig, StrategyName
from lightning_qlora.tools.memory_estimate import MemoryEstimate, PlannedRun
from lightning_qlora.training.gradient_checkpointing import transformers_checkpointing_layers
from lightning_qlora.training.report import parameter_bytes, size_text

UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
DRIVER = 0.8e9  # bytes that a run can't use
FRAGMENTATION = 0.04  # share of the memory that a run can't use
# Arguments that save memory; the last one costs time.
SAVING: dict[str, Any] = {
    "paged_optimizer": "auto",
    "deferred_logits": "auto",
    "gradient_checkpointing": True,
}


def parse_memory(text: str) -> int:
    """Bytes of a text such as 24GB (24 * 10^9), 24GiB (24 * 2^30) or 24000000000; ValueError for other texts."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ValueError(f"gpu_memory={text!r}: must be a number of bytes with a unit, such as 24GB, 24GiB or 80000MB.")
    count = int(float(match[1]) * UNITS[(match[2] or "").upper()])
    if count < UNITS["MB"]:
        raise ValueError(f"gpu_memory={text!r}: are {count} bytes. Give a unit, such as 24GB or 24GiB.")
    return count


def bytes_on_each(run: PlannedRun, estimate: MemoryEstimate, devices: int = 1, strategy: StrategyName = "ddp") -> int:
    """Bytes that a run needs on each device.

    DDP: all, and a second decode buffer for the thread of the backward pass. FSDP2, with `fully_shard` on each block
    and on the model: the device's part of weights, gradients and optimizer state, the activations, and two whole
    blocks, the one that runs and the next.
    """
    parts = estimate.parts
    if strategy == "ddp" or devices == 1:
        return estimate.device + parts["decode buffer"]
    blocks = [parameter_bytes(block) for block in transformers_checkpointing_layers(run.model)]
    whole = parameter_bytes(run.model)
    gathered = whole
    if blocks:
        gathered += 2 * max(blocks) - sum(blocks)
    sharded = whole + parts["gradients"]
    if not estimate.paged:
        sharded += parts["optimizer state"]
    return gathered + parts["activations"] + 2 * parts["decode buffer"] + sharded // devices


def fits(needed: int, gpu_memory: int, config: QLoRAConfig) -> str:
    """A sentence: whether the bytes fit on a GPU, and what to change if they do not."""
    usable = int(gpu_memory * (1 - FRAGMENTATION) - DRIVER)
    available = (
        f"{both_units(usable)} of {both_units(gpu_memory)} (the driver takes up to {size_text(DRIVER)}, fragmentation "
        f"{FRAGMENTATION:.0%})"
    )
    if needed <= usable:
        return f"It fits: it needs {both_units(needed)}, and there are {available}."
    changes = [f"{name}={value}" for name, value in SAVING.items() if getattr(config, name) is False]
    changes += ["a smaller batch_size, sequence_length or r", "more devices with FSDP2 (--devices)"]
    return f"It does not fit: it needs {both_units(needed)}, and there are {available}. Try {', '.join(changes)}."


def both_units(count: int) -> str:
    """Bytes in GB and in GiB."""
    return f"{size_text(count)} ({size_text(count, 1024)})"
