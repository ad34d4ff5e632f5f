"""estimate_memory: the memory of a QLoRA run, by part, computed without allocating it; whether it fits on a GPU.

The module is copied to tensors without data (torch's FakeTensorMode) and converted, and a training step runs on it. So
activations and temporary tensors are counted, not guessed.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from typing_extensions import Unpack

from lightning_qlora.activations.device_memory import memory_of
from lightning_qlora.activations.gradient_checkpointing import (
    budget_of,
    enable_gradient_checkpointing,
    transformers_checkpointing_layers,
)
from lightning_qlora.adapters.load import config_of_adapter
from lightning_qlora.adapters.peft_folder import read_adapter
from lightning_qlora.arguments import QLoRAArguments
from lightning_qlora.checks import check_choice, check_integer, refuse_unknown_arguments
from lightning_qlora.config import DeviceName, OptimizerName, QLoRAConfig, StrategyName
from lightning_qlora.conversion.convert import Run, convert_module
from lightning_qlora.conversion.parameter_counts import count_parameters, packed_layers, parameter_bytes
from lightning_qlora.survey.parts import Parts
from lightning_qlora.tensors.device_types import IN_16_BITS, Held
from lightning_qlora.texts import size_text
from lightning_qlora.tools.activations import forward_function, step_memory
from lightning_qlora.tools.cards import find_card
from lightning_qlora.tools.fake_model import fake_copy, meta_model
from lightning_qlora.tools.patches import run_without_data

# Bytes of optimizer state per byte of a trained weight. In 8 bits: bytes per weight, for two moments of one byte each
# and one fp32 scale per 256 weights.
STATE = {"adamw": 2.0, "sgd": 0.0, "momentum": 1.0}
STATE_8BIT = 2 * (1 + 4 / 256)
DRIVER = 0.8e9  # bytes that a run can't use
# Bytes of a process that imported torch, with torch._dynamo for optimizers, transformers and this package: 0.49 GB
# with a module of two layers, 0.18 of it pages of files; the code of models takes more.
LIBRARIES = 0.65e9
FRAGMENTATION = 0.04  # share of the memory that a run can't use
# Arguments that save memory; the last one costs time.
SAVING: dict[str, Any] = {
    "paged_optimizer": "auto",
    "deferred_logits": "auto",
    "gradient_checkpointing": True,
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of memory of a run, by part.

    Attributes:
        parts: Part -> bytes. Parts: 4-bit weights, other frozen weights, trained weights, gradients, optimizer state,
            decode buffer, activations (with the temporary tensors of operations, at their peak).
        gradients_at_peak: Bytes of the gradients that exist when all parts together take most memory: none at the start
            of the backward pass, all at its end.
        paged: Whether the optimizer state can move to host memory when the device is full.
        trainable_parameters: Number of trained weights.
        total_parameters: Number of all weights, with the adapters.
        dense_bytes: Bytes of the weights before they are quantized.
        counted_activations: Whether the activations could be counted; if not, they are 0 in `parts`. They can't be
            where the forward pass needs an example, or depends on values of activations.
        layers: Name, status and number of layers, as in the report of a conversion.
        blocks: With gradient_checkpointing="auto" or bytes: number of blocks; activations are those of a step in which
            `kept_blocks` of them keep theirs. 0: no memory is known that they could fit in, so all are recomputed.
        kept_blocks: How many keep their activations.
        kept_bytes: Bytes that they keep.
        host_bytes: Bytes of host memory in which inputs of recomputed blocks wait on a GPU.

    Example:
        ```python
        import torch
        from lightning_qlora import estimate_memory
        from torch import nn

        estimate = estimate_memory(nn.Linear(256, 256), example=torch.randn(8, 256), r=8)
        print(estimate)  # a table
        print(estimate.total, estimate.device, estimate.parts["4-bit weights"])
        ```
    """

    parts: dict[str, int]
    gradients_at_peak: int
    paged: bool
    trainable_parameters: int
    total_parameters: int
    dense_bytes: int
    counted_activations: bool
    layers: list[tuple[str, str, str]] = field(default_factory=list, repr=False)
    blocks: int = 0
    kept_blocks: int = 0
    kept_bytes: int = 0
    host_bytes: int = 0

    @property
    def total(self) -> int:
        """Bytes at the peak: all parts, with only the gradients that exist then."""
        return sum(self.parts.values()) - self.parts["gradients"] + self.gradients_at_peak

    @property
    def device(self) -> int:
        """Bytes that must stay on the device: all at the peak except paged optimizer state."""
        if self.paged:
            return self.total - self.parts["optimizer state"]
        return self.total

    def __str__(self) -> str:
        texts = {part: _row(part, count) for part, count in self.parts.items()}
        if not self.counted_activations:
            hint = "(pass example=; loops over experts can't be counted)"
            texts["activations"] = f"{'activations':22}{'unknown':>12}  {hint}"
        elif self.blocks:
            kept = size_text(self.kept_bytes, 1024)
            texts["activations"] += f"  (of {self.blocks} blocks {self.kept_blocks} keep theirs: {kept})"
        if self.host_bytes:
            texts["activations"] += f"  (and {size_text(self.host_bytes)} in host memory)"
        if self.gradients_at_peak < self.parts["gradients"]:
            at_peak = "none"
            if self.gradients_at_peak:
                at_peak = size_text(self.gradients_at_peak)
            texts["gradients"] += f"  ({at_peak} of it at the peak of all parts)"
        if self.paged and self.parts["optimizer state"]:
            texts["optimizer state"] += "  (may move to host memory)"
        texts["total"] = _row("total at the peak", self.total)
        if self.device < self.total:
            texts["device"] = _row("  on the device", self.device) + "  (the optimizer state in host memory)"
        texts["notes"] = (
            f"{self.trainable_parameters:,} of {self.total_parameters:,} weights are trained. Before quantization the "
            f"weights alone take {size_text(self.dense_bytes)}. Not counted: the driver's own memory (0.3 to 0.8 GB on "
            "CUDA), on a CPU the imported libraries (about 0.3 GB), and fragmentation (a few percent)."
        )
        texts |= {name: f"{name}  x{count}  {status}" for name, status, count in self.layers}
        return "\n".join(texts.values())


def _row(name: str, count: int) -> str:
    return f"{name:22}{size_text(count):>12}{size_text(count, 1024):>12}"


def estimate_memory(
    model: nn.Module | str | os.PathLike[str] | Any,
    batch_size: int = 1,
    sequence_length: int = 512,
    optimizer: OptimizerName = "adamw",
    example: Any = None,
    device: DeviceName = "gpu",
    gpu: str | None = None,
    **arguments: Unpack[QLoRAArguments],
) -> MemoryEstimate:
    """Estimate the memory of training a model with QLoRA, without a GPU and without allocating the model.

    Args:
        model: A module on any device, also meta; a transformers config; or a folder or hub name of a transformers
            model.
        batch_size: Sequences per step.
        sequence_length: Tokens per sequence.
        optimizer: "adamw", "adamw8bit" (of torchao or bitsandbytes), "sgd", or "momentum" (SGD with momentum).
        example: Input of the module's forward, for a module that is not a transformers model: a tensor, a tuple, or a
            dict of keyword arguments. batch_size and sequence_length are not used then.
        device: "gpu", or "cpu": this machine's CPU, which may hold a 16-bit model in fp32.
        gpu: A card such as "T4", which holds a 16-bit model in fp32 if it has no bf16. None: a card with bf16. With
            gradient_checkpointing="auto" its memory decides how many blocks keep their activations.
        **arguments: The arguments of `QLoRAPrecision`. The initialization does not change the estimate, which is of
            device memory; "calibrated" also needs host memory of the size of the dense weights until the first step.

    Returns:
        The bytes by part; `print` shows them as a table.

    Raises:
        TypeError, ValueError: If an argument is wrong, no model can be built from the config, sequences are longer than
            its positions, or a step fails.

    Example:
        ```python
        import torch
        from lightning_qlora import estimate_memory
        from torch import nn

        model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
        estimate = estimate_memory(model, optimizer="adamw8bit", example=torch.randn(32, 256), r=16)
        print(f"{estimate.total / 1e6:.1f} MB")
        ```
    """
    names = ["batch_size", "sequence_length", "optimizer", "example", "device", "gpu"]
    refuse_unknown_arguments(arguments, [*names, *QLoRAConfig.__dataclass_fields__])
    config = QLoRAConfig(**arguments)  # type: ignore[arg-type]  # takes a torch.dtype, too
    return PlannedRun(model, optimizer, config, example, device, gpu).estimate(batch_size, sequence_length)


class PlannedRun:
    """A converted model without data, for which steps of several sizes can be estimated; see `estimate_memory`.

    Attributes:
        gpu_memory: Bytes of the GPU; None: not known.
        host_memory: Bytes of the host in which inputs of blocks may wait.
    """

    def __init__(
        self,
        model: Any,
        optimizer: OptimizerName,
        config: QLoRAConfig,
        example: Any = None,
        device: DeviceName = "gpu",
        gpu: str | None = None,
        sharded: bool = False,
    ) -> None:
        card = None if gpu is None else find_card(gpu, device)
        check_choice("optimizer", optimizer, get_args(OptimizerName))
        check_choice("device", device, get_args(DeviceName))
        if not isinstance(model, nn.Module):
            model = meta_model(model)
        config = config.changed(init_lora_weights="default")  # there is no weight, and the adapter has the same shape
        without_bf16 = card is not None and not card.bf16
        if without_bf16 and config.compute_dtype == "auto":
            config = replace(config, compute_dtype="fp16")
        self.config = config
        self.device = device
        self.gpu_memory = None if card is None else card.memory
        self.host_memory = math.inf
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)  # see RealIndices
        if config.adapter is not None:  # no file can be read under that mode
            config = config_of_adapter(Parts.of(model), read_adapter(config.adapter), config)
        with self._mode:
            self.model = fake_copy(model)
            if isinstance(example, Mapping):
                example = dict(example)
            self._example = tree_map_only(Tensor, self._mode.from_tensor, example)
            # The tensors without data are on the CPU.
            run = Run(sharded=sharded)
            if device == "gpu":
                run = Run(sharded=sharded, decide=_in_fp32 if without_bf16 else _on_a_card)
            self._report = convert_module(self.model, config, run)
            run_without_data(self.model)
        counts = count_parameters(self.model.modules())
        packed = counts.packed_bytes
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        state = trained * STATE[optimizer] if optimizer in STATE else counts.trainable * STATE_8BIT
        self._parts = {
            "4-bit weights": packed,
            "other frozen weights": parameter_bytes(self.model) - packed - trained,
            "trained weights": trained,
            "gradients": trained,
            "optimizer state": int(state),
            "decode buffer": _decode_buffers(packed_layers(self.model)),
        }

    @property
    def is_host_full(self) -> bool:
        budget = self._report.activations
        return budget is not None and budget.host.is_full

    def set_gradient_checkpointing(self, setting: bool | str) -> None:
        enable_gradient_checkpointing(self.model, setting)
        self._report.activations = budget_of(self.model.modules())

    def estimate(self, batch_size: int, sequence_length: int) -> MemoryEstimate:
        check_integer("batch_size", batch_size, at_least=1)
        check_integer("sequence_length", sequence_length, at_least=1)
        budget = self._report.activations
        if budget is None:
            return self._step(batch_size, sequence_length)
        # As in a run: first all blocks are recomputed, then a step decides by what that needed.
        budget.plan(self.host_memory if self.device == "gpu" else None)
        estimate = self._step(batch_size, sequence_length)
        available = self.available()
        is_known = budget.limit is not None or available != math.inf
        if budget.recomputes_all or not estimate.counted_activations or not is_known:
            return estimate
        budget.set_capacity(available, bytes_of_process(self, estimate))
        estimate = self._step(batch_size, sequence_length)
        kept = {"blocks": budget.blocks, "kept_blocks": budget.kept_blocks, "kept_bytes": budget.kept_bytes}
        return replace(estimate, **kept)

    def _step(self, batch_size: int, sequence_length: int) -> MemoryEstimate:
        with self._mode:
            forward = forward_function(self.model, batch_size, sequence_length, self._example)
            step = None
            if forward is not None:
                step = step_memory(self.model, forward, self.device)
        budget = self._report.activations
        activations, gradients_at_peak = step or (0, self._parts["gradients"])
        return MemoryEstimate(
            parts={**self._parts, "activations": activations},
            gradients_at_peak=gradients_at_peak,
            paged=bool(self.config.paged_optimizer),
            trainable_parameters=self._report.trainable_parameters,
            total_parameters=self._report.total_parameters,
            dense_bytes=self._report.bytes_before,
            counted_activations=step is not None,
            layers=self._report.rows(),
            host_bytes=budget.host.nbytes if budget is not None else 0,
        )

    def available(self) -> float:
        """Bytes that a run may use on the device; infinite if that is not known."""
        if self.device == "gpu":
            return math.inf if self.gpu_memory is None else self.gpu_memory - DRIVER
        memory = memory_of(torch.device("cpu"))
        return math.inf if memory is None else memory.available


def _in_fp32(_device: torch.device, dtype: torch.dtype) -> Held | None:
    return Held(torch.float32, "the card has no bf16") if dtype in IN_16_BITS else None


def _on_a_card(_device: torch.device, dtype: torch.dtype) -> Held | None:
    return Held(torch.bfloat16, "the card has bf16") if dtype is torch.float16 else None


def _decode_buffers(layers: Iterable[Any]) -> int:
    largest: dict[torch.dtype, int] = {}
    for layer in layers:
        dtypes = {layer.compute_dtype(torch.device("cpu"))}
        if layer.matrix_class.reads_weight:
            dtypes.add(torch.float32)  # which DoRA reads for the norms of its rows
        for dtype in dtypes:
            largest[dtype] = max(largest.get(dtype, 0), math.prod(layer._shape[-2:]))
    return sum(dtype.itemsize * numel for dtype, numel in largest.items())


def bytes_of_process(
    run: PlannedRun, estimate: MemoryEstimate, devices: int = 1, strategy: StrategyName = "ddp"
) -> float:
    """As `bytes_on_each`; on a CPU with the libraries, which are in the same memory."""
    if run.device == "cpu":
        return estimate.total + LIBRARIES
    return bytes_on_each(run, estimate, devices, strategy)


def bytes_on_each(run: PlannedRun, estimate: MemoryEstimate, devices: int = 1, strategy: StrategyName = "ddp") -> int:
    """Bytes that a run needs on each device.

    DDP: all. FSDP2, with `fully_shard` on each block and on the model: the device's part of weights, gradients and
    optimizer state, the activations, and two whole blocks, the one that runs and the next.
    """
    parts = estimate.parts
    if strategy == "ddp" or devices == 1:
        return estimate.device
    whole = parameter_bytes(run.model)
    gathered = whole
    if sizes := [parameter_bytes(block) for block in transformers_checkpointing_layers(run.model)]:
        gathered += 2 * max(sizes) - sum(sizes)
    sharded = whole + parts["gradients"]
    if not estimate.paged:
        sharded += parts["optimizer state"]
    return gathered + parts["activations"] + parts["decode buffer"] + sharded // devices


def usable_bytes(gpu_memory: int) -> int:
    return int(gpu_memory * (1 - FRAGMENTATION) - DRIVER)


def fits(needed: int, gpu_memory: int, config: QLoRAConfig) -> str:
    available = usable_bytes(gpu_memory)
    text = (
        f"{both_units(available)} of {both_units(gpu_memory)} (the driver takes up to {size_text(DRIVER)}, "
        f"fragmentation {FRAGMENTATION:.0%})"
    )
    if needed <= available:
        return f"It fits: it needs {both_units(needed)}, and there are {text}."
    changes = [f"{name}={value}" for name, value in SAVING.items() if vars(config).get(name) is False]
    changes += ["a smaller batch_size, sequence_length or r", "more devices with FSDP2 (--devices)"]
    return f"It does not fit: it needs {both_units(needed)}, and there are {text}. Try {', '.join(changes)}."


def both_units(count: int) -> str:
    return f"{size_text(count)} ({size_text(count, 1024)})"
