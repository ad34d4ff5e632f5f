"""What each of several devices holds and sends in a step, under DDP, FSDP2 and HSDP: `plan --devices`."""

import re
from collections.abc import Iterator

from torch import nn

from lightning_qlora.config import StrategyName
from lightning_qlora.tools.fit import both_units, line, needed, parse_memory, sharded_memory
from lightning_qlora.tools.memory_estimate import PlannedRun
from lightning_qlora.training.gradient_checkpointing import transformers_checkpointing_layers
from lightning_qlora.training.report import parameter_bytes, size_text

FROZEN, TRAINED, GRADIENTS = "frozen weights", "adapters and what trains in full", "gradients"


def traffic(model: nn.Module, replicas: int, shards: int) -> dict[str, int]:
    """Bytes of each kind that a device sends in a step, and as many that it receives, with rings; shards=1 is DDP.

    FSDP2 gathers each block in the forward and in the backward pass and the other parameters once, and reduces the
    gradients: (S - 1) / S of the bytes for S shards. R replicas reduce what is left: 2 (R - 1) / R. What trains is
    counted in its type; FSDP2 casts it first under a MixedPrecisionPolicy.
    """
    blocks = nn.ModuleList(transformers_checkpointing_layers(model))
    trained = trained_bytes(model)
    adapters = trained + trained_bytes(blocks)
    frozen = parameter_bytes(model) + parameter_bytes(blocks) - adapters
    share = (shards - 1) / shards
    reduced = trained * share + trained / shards * 2 * (replicas - 1) / replicas
    return {FROZEN: int(frozen * share), TRAINED: int(adapters * share), GRADIENTS: int(reduced)}


def trained_bytes(module: nn.Module) -> int:
    """Bytes of the parameters that train."""
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def parse_devices(text: str, strategy: StrategyName) -> tuple[int, int]:
    """Replicas and shards of a text such as 8 or 2x4 (HSDP: 2 replicas in 4 shards); ValueError for other texts."""
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", text.strip())
    if match is None or (match[1] and strategy == "ddp"):
        raise ValueError(f"devices={text!r}: must be a number, such as 8, or for FSDP2 replicas x shards, such as 2x4.")
    return (int(match[2]), 1) if strategy == "ddp" else (int(match[1] or 1), int(match[2]))


def what_devices_do(
    run: PlannedRun, devices: str, strategy: StrategyName, link: str | None, batch_size: int, sequence_length: int
) -> Iterator[str]:
    """Lines with the memory of each device, what it sends in a step, and the time that takes; the batch is of each."""
    replicas, shards = parse_devices(devices, strategy)
    speed = None if link is None else parse_memory(link.strip().removesuffix("/s"), "link")
    if strategy == "fsdp":
        run = run.with_arguments(deferred_logits=False)
    estimate = run.estimate(batch_size, sequence_length)
    kept, shared = sharded_memory(run, estimate)
    memory = needed(estimate) if strategy == "ddp" else kept + shared // shards
    sent = traffic(run.model, replicas, shards)
    total = sum(sent.values())
    name = "DDP" if strategy == "ddp" else "FSDP2" if replicas == 1 else "HSDP"
    yield line(f"{devices} devices with {name}, {batch_size} x {sequence_length}", f"{both_units(memory)} on each")
    yield line("each sends in a step", size_text(total))
    yield from (line(f"  {kind}", size_text(count)) for kind, count in sent.items() if count or kind == GRADIENTS)
    if speed is not None:
        yield line(f"time at {link}", f"{total / speed * 1e3:,.1f} ms, less what overlaps with computation")
