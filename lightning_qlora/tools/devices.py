"""What each of several devices holds and sends in a step, under DDP, FSDP2 and HSDP: `plan --devices`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lightning_qlora.config import StrategyName
from lightning_qlora.tools.fit import both_units, line, needed, parse_memory, sharded_memory
from lightning_qlora.tools.memory_estimate import PlannedRun
from lightning_qlora.training.gradient_checkpointing import transformers_checkpointing_layers
from lightning_qlora.training.report import parameter_bytes, size_text


@dataclass(frozen=True)
class Traffic:
    """Bytes that each device sends in a step, and as many that it receives, with rings.

    FSDP2 gathers each block in the forward and in the backward pass and the other parameters once, and reduces the
    gradients: (S - 1) / S of the bytes for S shards. R replicas reduce what is left: 2 (R - 1) / R.

    Attributes:
        weights: Gathered frozen parameters.
        adapters: Gathered trained parameters, in their type; FSDP2 casts them first under a MixedPrecisionPolicy.
        gradients: Reduced gradients.
    """

    weights: int
    adapters: int
    gradients: int

    @classmethod
    def of(cls, model: nn.Module, replicas: int, shards: int) -> "Traffic":
        """The traffic of a model whose blocks and root are sharded one by one; shards=1 is DDP."""
        blocks = nn.ModuleList(transformers_checkpointing_layers(model))
        trained = trained_bytes(model)
        adapters = trained + trained_bytes(blocks)
        gathered = parameter_bytes(model) + parameter_bytes(blocks)
        share = (shards - 1) / shards
        reduced = trained * share + trained / shards * 2 * (replicas - 1) / replicas
        return cls(int((gathered - adapters) * share), int(adapters * share), int(reduced))

    @property
    def total(self) -> int:
        """All bytes of a step."""
        return self.weights + self.adapters + self.gradients


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
    estimate = run.estimate(batch_size, sequence_length, sharded=strategy == "fsdp")
    kept, shared = sharded_memory(run, estimate)
    memory = needed(estimate) if strategy == "ddp" else kept + shared // shards
    traffic = Traffic.of(run.model, replicas, shards)
    name = "DDP" if strategy == "ddp" else "FSDP2" if replicas == 1 else "HSDP"
    yield line(f"{devices} devices with {name}, {batch_size} x {sequence_length}", f"{both_units(memory)} on each")
    yield line("each sends in a step", size_text(traffic.total))
    if shards > 1:
        yield line("  frozen weights", size_text(traffic.weights))
        yield line("  adapters and what trains in full", size_text(traffic.adapters))
    yield line("  gradients", size_text(traffic.gradients))
    if speed is not None:
        yield line(f"time at {link}", f"{traffic.total / speed * 1e3:,.1f} ms, less what overlaps with computation")
