"""The memory of fine-tuning by method and part, as stacked bars (figures 1 and 6 of the QLoRA paper)."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.tools.activations import forward_function, step_memory
from lightning_qlora.tools.fake_model import fake_copy, meta_model, prepare_step
from lightning_qlora.tools.memory_estimate import STATE, STATE_8BIT, MemoryEstimate
from lightning_qlora.words import install

PARTS = {  # part -> color
    "weights": "#4c72b0", "adapters": "#dd8452", "gradients": "#55a868", "optimizer state": "#c44e52",
    "activations": "#8172b3",
}  # fmt: skip


def compare(
    model: Any, qlora: MemoryEstimate, batch_size: int, sequence_length: int, optimizer: str, config: QLoRAConfig
) -> dict[str, dict[str, int]]:
    """Bytes at the peak by method and part.

    Full fine-tuning trains all weights in their own type, with gradients of that type and fp32 optimizer state, as the
    paper counts it: 12 bytes for each bf16 weight. 16-bit LoRA has the adapters and the activations of QLoRA, and
    weights in their own type. Paged optimizer state is in host memory at the peak.

    Args:
        model: As in `estimate_memory`.
        qlora: Its estimate for the arguments that follow.
        batch_size: Sequences per step.
        sequence_length: Tokens per sequence.
        optimizer: Optimizer whose state is counted.
        config: The arguments of the conversion.
    """
    parts = qlora.parts
    with_adapters = {
        "weights": parts["4-bit weights"] + parts["other frozen weights"],
        "adapters": parts["trained weights"],
        "gradients": qlora.gradients_at_peak,
        "optimizer state": parts["optimizer state"],
        "activations": parts["decode buffer"] + parts["activations"],
    }
    return {
        "full\nfine-tuning": full_fine_tuning(model, batch_size, sequence_length, optimizer, config),
        "16-bit\nLoRA": with_adapters | {"weights": qlora.dense_bytes, "activations": parts["activations"]},
        "QLoRA": with_adapters,
        "QLoRA,\npaged state": with_adapters | {"optimizer state": 0},
    }


def full_fine_tuning(
    model: Any, batch_size: int, sequence_length: int, optimizer: str, config: QLoRAConfig
) -> dict[str, int]:
    """Bytes at the peak, by part, of training all weights; see `compare`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        made = fake_copy(model if isinstance(model, nn.Module) else meta_model(model)).requires_grad_(True)
        prepare_step(made, config)
        forward = forward_function(made, batch_size, sequence_length, None)
        step = None if forward is None else step_memory(made, forward)
    weights = sum(parameter.nbytes for parameter in made.parameters())
    count = sum(parameter.numel() for parameter in made.parameters())
    of_weight = STATE_8BIT if optimizer == "adamw8bit" else STATE[optimizer] * torch.float32.itemsize
    return {
        "weights": weights,
        "adapters": 0,
        "gradients": weights if step is None else step.gradients,
        "optimizer state": int(count * of_weight),
        "activations": 0 if step is None else step.activations,
    }


def draw(bars: dict[str, dict[str, int]], title: str, path: Path) -> None:
    """Write the picture.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plot={str(path)!r}: needs matplotlib: {install('plots')}") from error
    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    below = [0.0] * len(bars)
    for part, color in PARTS.items():
        heights = [bar[part] / 1e9 for bar in bars.values()]
        axes.bar(list(bars), heights, bottom=below, label=part, color=color, width=0.6)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    for place, total in enumerate(below):
        axes.annotate(f"{total:.3g}", (place, total), ha="center", va="bottom")
    axes.set(title=title, ylabel="GB at the peak of a step")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
