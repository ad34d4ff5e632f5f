"""What fits on a GPU: which settings, the largest batch, the longest sequence, and the smallest number of GPUs."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.tools.activations import positions_of
from lightning_qlora.tools.memory_estimate import MemoryEstimate, PlannedRun
from lightning_qlora.training.gradient_checkpointing import transformers_checkpointing_layers
from lightning_qlora.training.report import parameter_bytes, size_text

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DRIVER, FRAGMENTATION = 0.8e9, 0.04  # bytes, and share of the memory, that a run can't use
LENGTH_STEP = 128  # tokens between the lengths that are tried
LONGEST, LARGEST_BATCH = 1 << 20, 1 << 12  # tokens and sequences that are tried at most
# Arguments that are tried, in this order: those that cost nothing, time, quality.
TRIED: dict[str, Any] = {"paged_optimizer": "auto", "deferred_logits": "auto", "gradient_checkpointing": True, "r": 16}


def parse_memory(text: str, name: str = "gpu_memory") -> int:
    """Bytes of a text such as 24GB (24 * 10^9), 24GiB (24 * 2^30) or 24000000000; ValueError for other texts."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ValueError(f"{name}={text!r}: must be a number of bytes with a unit, such as 24GB, 24GiB or 80000MB.")
    count = int(float(match[1]) * UNITS[(match[2] or "").upper()])
    if count < UNITS["MB"]:
        raise ValueError(f"{name}={text!r}: are {count} bytes. Give a unit, such as 24GB or 24GiB.")
    return count


def what_fits(run: PlannedRun, gpu_memory: str, batch_size: int, sequence_length: int) -> Iterator[str]:
    """Lines that say which settings fit, and what fits with them; arguments: `estimate_memory` and `parse_memory`."""
    memory = parse_memory(gpu_memory)
    usable = int(memory * (1 - FRAGMENTATION) - DRIVER)
    yield (
        f"GPU memory {both_units(memory)}, for the run {both_units(usable)}: the driver takes up to "
        f"{size_text(DRIVER)}, fragmentation {FRAGMENTATION:.0%}. A card that is sold as 24 GB has 24 GiB: pass 24GiB."
    )
    names = list[str]()
    for name, value in [("", None), *TRIED.items()]:
        if name:
            if not _saves_memory(run.config, name, value):
                continue
            run = PlannedRun(run.made, run.optimizer, replace(run.config, **{name: value}))
            names.append(f"{name}={value}")
        estimate = run.estimate(batch_size, sequence_length)
        if not estimate.counted_activations:
            yield "The activations can't be counted, so it is not known what fits."
            return
        fits = needed(estimate) <= usable
        yield line(
            f"{batch_size} x {sequence_length}, {' '.join(names) or 'as asked'}",
            f"{both_units(needed(estimate))}, {'fits' if fits else 'does not fit'}",
        )
        if fits:
            yield from _largest_sizes(run, usable, batch_size, sequence_length)
            break
    yield _gpus(run, usable, batch_size, sequence_length)


def needed(estimate: MemoryEstimate) -> int:
    """Bytes that a run needs on a GPU, where the backward pass decodes weights into buffers of its own."""
    return estimate.device + estimate.parts["decode buffer"]


def _saves_memory(config: QLoRAConfig, name: str, value: Any) -> bool:
    return config.r > value and config.adapter is None if name == "r" else getattr(config, name) is False


def _largest_sizes(run: PlannedRun, usable: int, batch_size: int, sequence_length: int) -> Iterator[str]:
    batch = largest(lambda n: needed(run.estimate(n, sequence_length)), usable, batch_size, 1, LARGEST_BATCH)
    yield line(f"largest batch of {sequence_length} tokens", f"{batch}{' or more' if batch >= LARGEST_BATCH else ''}")
    longest = positions_of(run.model) or LONGEST
    start = sequence_length // LENGTH_STEP * LENGTH_STEP or min(LENGTH_STEP, longest)
    if needed(run.estimate(batch_size, start)) > usable:
        start = sequence_length
    length = largest(lambda n: needed(run.estimate(batch_size, n)), usable, start, LENGTH_STEP, longest)
    why = ", all positions of the model" if length == positions_of(run.model) else ""
    yield line(f"longest sequence at batch size {batch_size}", f"{length:,} tokens{why}")


def largest(memory: Callable[[int], int], budget: int, fitting: int, step: int, limit: int) -> int:
    """The largest of fitting, fitting + step, ... that needs no more than the budget, or the limit if that fits.

    `memory` (number -> bytes) grows almost linearly, so a line through two known points leads to it in few calls.
    """
    low, high, bytes_low = fitting, limit + step, memory(fitting)
    guess, bisect = min(2 * fitting, limit), False
    while high - low > step and low < limit:
        guess = min(max(guess, low + step), high - step, limit)
        count = memory(guess)
        slope = (count - bytes_low) / (guess - low)
        if count <= budget:
            low, bytes_low = guess, count
        else:
            high = guess
        bisect = high <= limit and not bisect  # every second time, so that the distance halves
        room = (high - low) / 2 if bisect else (budget - bytes_low) / max(slope, 1e-9)
        guess = low + int(min(room, limit)) // step * step
    return low


def sharded_memory(run: PlannedRun, estimate: MemoryEstimate) -> tuple[int, int]:
    """Bytes on each GPU under FSDP2, whose logits are not deferred, and bytes of which each holds a part.

    Each has activations, and all of the block that runs and the next.
    """
    parts, blocks = estimate.parts, [parameter_bytes(block) for block in transformers_checkpointing_layers(run.model)]
    whole = parameter_bytes(run.model)
    gathered = whole - sum(blocks) + 2 * max(blocks) if blocks else whole
    shared = whole + parts["gradients"] + (0 if estimate.paged else parts["optimizer state"])
    return gathered + parts["activations"] + 2 * parts["decode buffer"], shared


def _gpus(run: PlannedRun, usable: int, batch_size: int, sequence_length: int) -> str:
    """The number of GPUs with FSDP2; the batch is that of each."""
    estimate = run.estimate(batch_size, sequence_length, sharded=True)
    kept, shared = sharded_memory(run, estimate)
    name = f"GPUs with FSDP2, {batch_size} x {sequence_length} on each"
    if kept >= usable:
        return line(name, f"none: {both_units(kept)} of activations and gathered weights are on each")
    gpus = max(1, -(-shared // (usable - kept))) if needed(estimate) > usable else 1
    return line(name, f"{gpus}, {both_units(needed(estimate) if gpus == 1 else kept + shared // gpus)} on each")


def line(name: str, value: str) -> str:
    """A line of a table."""
    return f"{name:44}  {value}"


def both_units(count: int) -> str:
    """Bytes in GB and in GiB."""
    return f"{size_text(count)} ({size_text(count, 1024)})"
