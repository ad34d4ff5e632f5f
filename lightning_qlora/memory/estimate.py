"""estimate_memory: what a QLoRA run will take, by part, without allocating any of it.

The module is copied with tensors that have shapes and no data (torch's FakeTensorMode), converted, and run once: what
autograd keeps for the backward pass is then counted, not guessed.
"""

import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_qlora.config import QLoRAConfig, check_choice
from lightning_qlora.convert import check_initialized
from lightning_qlora.linear import QLoRALinear
from lightning_qlora.loaded import config_while_loading
from lightning_qlora.memory.activations import activation_bytes, faked, forward_of
from lightning_qlora.memory.twin import convert_twin, model_of, without_data
from lightning_qlora.packed_linear import BASE
from lightning_qlora.report import count_parameters, size_text

OptimizerName = Literal["adamw", "adamw8bit", "sgd", "momentum"]
# State for each weight that trains, in units of its own bytes (8-bit: bytes, two codes and two fp32 scales of 256).
STATE = {"adamw": 2.0, "sgd": 0.0, "momentum": 1.0}
STATE_8BIT = 2 + 2 * 4 / 256
PARTS = ("4-bit weights", "other frozen weights", "trained weights", "gradients", "optimizer state",
         "decode buffer", "activations")  # fmt: skip


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run takes, by part.

    Attributes:
        parts: Part -> bytes; see `PARTS`.
        paged: Whether the optimizer state can move to host memory when the device is full.
        trainable_parameters: Number of weights that train.
        total_parameters: Number of all weights, the adapters included.
        dense_bytes: Bytes of the weights as the model comes, not in 4 bits.
        counted_activations: Whether a forward pass could be run to count activations; otherwise they are left out.
    """

    parts: dict[str, int]
    paged: bool
    trainable_parameters: int
    total_parameters: int
    dense_bytes: int
    counted_activations: bool

    @property
    def total(self) -> int:
        """Everything, in bytes."""
        return sum(self.parts.values())

    @property
    def device(self) -> int:
        """What must stay on the device: everything but optimizer state that is paged."""
        return self.total - (self.parts["optimizer state"] if self.paged else 0)

    def __str__(self) -> str:
        lines = [f"{part:22}{size_text(count):>10}" for part, count in self.parts.items()]
        if not self.counted_activations:
            lines[-1] = f"{'activations':22}{'unknown':>10}  (pass example= to count them)"
        moves = "  (may move to host memory)" if self.paged and self.parts["optimizer state"] else ""
        lines[PARTS.index("optimizer state")] += moves
        return "\n".join(
            [
                *lines,
                f"{'total':22}{size_text(self.total):>10}",
                f"{self.trainable_parameters:,} of {self.total_parameters:,} weights train; dense, the weights alone "
                f"take {size_text(self.dense_bytes)}. Not counted: the driver's own memory (0.3 to 0.8 GB on CUDA) and "
                "fragmentation (some percent).",
            ]
        )


def estimate_memory(
    model: nn.Module | str | os.PathLike[str] | Any,
    batch_size: int = 1,
    sequence_length: int = 512,
    optimizer: OptimizerName = "adamw",
    example: Any = None,
    **arguments: Any,
) -> MemoryEstimate:
    """Estimate the memory of training a model with QLoRA; allocates nothing of its size and needs no GPU.

    Args:
        model: A module, on any device or none; a transformers config; or a folder or hub name of a transformers model.
        batch_size: Sequences a step.
        sequence_length: Tokens a sequence.
        optimizer: "adamw", "adamw8bit" (PagedAdamW8bit), "sgd", or "momentum" (SGD with it).
        example: Input of the module's forward, for one that is no transformers model: a tensor, a tuple, or a dict of
            keyword arguments. batch_size and sequence_length have no effect then.
        **arguments: Those of `QLoRAPrecision`. Where an adapter starts changes nothing here; init_lora_weights=
            "calibrated" takes as much host memory as the dense weights, until the first batches have been seen.

    Raises:
        TypeError, ValueError: If an argument is wrong, no model can be made of a config, or a forward pass fails.
    """
    check_choice("optimizer", optimizer, get_args(OptimizerName))
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a whole number of 1 or more.")
    config = QLoRAConfig(**arguments)
    made = model if isinstance(model, nn.Module) else model_of(model)
    check_initialized(made)
    with FakeTensorMode() as mode:
        same_size = config_while_loading(config)  # a start computed from the weight makes an adapter of the same shape
        return _estimate(without_data(made), batch_size, sequence_length, optimizer, faked(example, mode), same_size)


def _estimate(
    twin: nn.Module, batch_size: int, sequence_length: int, optimizer: str, example: Any, config: QLoRAConfig
) -> MemoryEstimate:
    dense_bytes = sum(parameter.nbytes for parameter in twin.parameters())
    converted = convert_twin(twin, config)
    trainable, total, _ = count_parameters(twin)
    packed = sum(
        p.nbytes for layer in converted for key, p in layer._parameters.items() if p is not None and key in BASE
    )
    trained = [p for p in twin.parameters() if p.requires_grad]
    trained_bytes = sum(p.nbytes for p in trained)
    run = forward_of(twin, batch_size, sequence_length, example)
    state = trainable * STATE_8BIT if optimizer == "adamw8bit" else trained_bytes * STATE[optimizer]
    counts = (
        packed,
        sum(p.nbytes for p in twin.parameters()) - packed - trained_bytes,
        trained_bytes,
        trained_bytes,
        int(state),
        _decode_buffers(converted),
        0 if run is None else activation_bytes(twin, run, config.gradient_checkpointing),
    )
    parts = dict(zip(PARTS, counts, strict=True))
    return MemoryEstimate(parts, bool(config.paged_optimizer), trainable, total, dense_bytes, run is not None)


def _decode_buffers(layers: list[QLoRALinear]) -> int:
    """Bytes of the buffers that weights are decoded into: one for each type, as large as its largest weight."""
    largest: dict[torch.dtype, int] = {}
    for layer in layers:
        types = {layer.compute_dtype(torch.empty(0, dtype=layer.weight_dtype))}
        if layer.config.use_dora:
            types.add(torch.float32)  # the norm of the rows
        for dtype in types:
            largest[dtype] = max(largest.get(dtype, 0), layer.weight_bytes.numel)
    return sum(dtype.itemsize * numel for dtype, numel in largest.items())
