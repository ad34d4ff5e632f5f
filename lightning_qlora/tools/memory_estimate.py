"""estimate_memory: the memory of a QLoRA run, by part, computed without allocating it.

The module is copied to tensors without data (torch's FakeTensorMode), converted, and run once. So the activations that
autograd saves for the backward pass are counted, not guessed.
"""

import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_qlora.config import QLoRAConfig, check_choice, check_integer
from lightning_qlora.layers.packed_linear import BASE
from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.tools.activations import activation_bytes, fake_example, forward_function
from lightning_qlora.tools.fake_model import convert_fake_model, fake_copy, meta_model
from lightning_qlora.training.convert import check_initialized
from lightning_qlora.training.report import count_parameters, size_text

OptimizerName = Literal["adamw", "adamw8bit", "sgd", "momentum"]
# Bytes of optimizer state per byte of a trained weight. In 8 bits: bytes per weight, for two moments of one byte each
# and one fp32 scale per 256 weights.
STATE = {"adamw": 2.0, "sgd": 0.0, "momentum": 1.0}
STATE_8BIT = 2 * (1 + 4 / 256)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of memory of a run, by part.

    Attributes:
        parts: Part -> bytes. Parts: 4-bit weights, other frozen weights, trained weights, gradients, optimizer state,
            decode buffer, activations.
        paged: Whether the optimizer state can move to host memory when the device is full.
        trainable_parameters: Number of trained weights.
        total_parameters: Number of all weights, with the adapters.
        dense_bytes: Bytes of the weights before they are quantized.
        counted_activations: Whether the activations could be counted; if not, they are 0 in `parts`. They can't be
            where the forward pass needs an example, or depends on values (loops over the experts that tokens chose).
    """

    parts: dict[str, int]
    paged: bool
    trainable_parameters: int
    total_parameters: int
    dense_bytes: int
    counted_activations: bool

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def device(self) -> int:
        """Bytes that must stay on the device: all parts except paged optimizer state."""
        return self.total - (self.parts["optimizer state"] if self.paged else 0)

    def __str__(self) -> str:
        texts = {part: f"{part:22}{size_text(count):>10}" for part, count in self.parts.items()}
        if not self.counted_activations:
            texts["activations"] = (
                f"{'activations':22}{'unknown':>10}  (pass example=; loops over experts can't be counted)"
            )
        if self.paged and self.parts["optimizer state"]:
            texts["optimizer state"] += "  (may move to host memory)"
        texts["total"] = f"{'total':22}{size_text(self.total):>10}"
        texts["notes"] = (
            f"{self.trainable_parameters:,} of {self.total_parameters:,} weights are trained. Before quantization the "
            f"weights alone take {size_text(self.dense_bytes)}. Not counted: the driver's own memory (0.3 to 0.8 GB on "
            "CUDA) and fragmentation (a few percent)."
        )
        return "\n".join(texts.values())


def estimate_memory(
    model: nn.Module | str | os.PathLike[str] | Any,
    batch_size: int = 1,
    sequence_length: int = 512,
    optimizer: OptimizerName = "adamw",
    example: Any = None,
    **arguments: Any,
) -> MemoryEstimate:
    """Estimate the memory of training a model with QLoRA, without a GPU and without allocating the model.

    Args:
        model: A module on any device, also meta; a transformers config; or a folder or hub name of a transformers
            model.
        batch_size: Sequences per step.
        sequence_length: Tokens per sequence.
        optimizer: "adamw", "adamw8bit" (PagedAdamW8bit), "sgd", or "momentum" (SGD with momentum).
        example: Input of the module's forward, for a module that is not a transformers model: a tensor, a tuple, or a
            dict of keyword arguments. batch_size and sequence_length are not used then.
        **arguments: The arguments of `QLoRAPrecision`. The initialization does not change the estimate, which is of
            device memory; "calibrated" also needs host memory of the size of the dense weights until the first step.

    Raises:
        TypeError, ValueError: If an argument is wrong, no model can be built from the config, or the forward pass
            fails.
    """
    check_choice("optimizer", optimizer, get_args(OptimizerName))
    check_integer("batch_size", batch_size, at_least=1)
    check_integer("sequence_length", sequence_length, at_least=1)
    config = QLoRAConfig(**arguments)
    made = model if isinstance(model, nn.Module) else meta_model(model)
    check_initialized(made)
    with FakeTensorMode() as mode:
        if config.initializes_from_weight:  # there is no weight, and the adapter has the same shape
            config = config.with_initialization("default")
        return _estimate(fake_copy(made), batch_size, sequence_length, optimizer, fake_example(example, mode), config)


def _estimate(
    fake_model: nn.Module, batch_size: int, sequence_length: int, optimizer: str, example: Any, config: QLoRAConfig
) -> MemoryEstimate:
    dense_bytes = sum(parameter.nbytes for parameter in fake_model.parameters())
    layers = convert_fake_model(fake_model, config)
    trainable, total, bytes_after = count_parameters(fake_model)
    packed = sum(p.nbytes for layer in layers for key, p in layer._parameters.items() if p is not None and key in BASE)
    trained = sum(p.nbytes for p in fake_model.parameters() if p.requires_grad)
    run = forward_function(fake_model, batch_size, sequence_length, example)
    activations = None if run is None else activation_bytes(fake_model, run, config.gradient_checkpointing)
    parts = {
        "4-bit weights": packed,
        "other frozen weights": bytes_after - packed - trained,
        "trained weights": trained,
        "gradients": trained,
        "optimizer state": int(trainable * STATE_8BIT if optimizer == "adamw8bit" else trained * STATE[optimizer]),
        "decode buffer": _decode_buffers(layers),
        "activations": activations or 0,
    }
    return MemoryEstimate(parts, bool(config.paged_optimizer), trainable, total, dense_bytes, activations is not None)


def _decode_buffers(layers: list[QLoRALinear]) -> int:
    """Bytes of the buffers that weights are decoded to: one for each dtype, of the size of the largest weight."""
    largest: dict[torch.dtype, int] = {}
    for layer in layers:
        types = {layer.compute_dtype(torch.empty(0, dtype=layer.weight_dtype, device="cpu"))}
        if layer.config.use_dora:
            types.add(torch.float32)  # the norm of the rows
        for dtype in types:
            largest[dtype] = max(largest.get(dtype, 0), layer.weight_bytes.numel)
    return sum(dtype.itemsize * numel for dtype, numel in largest.items())
