"""ConversionReport: what conversion did, in numbers a user can check."""

import re
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from lightning_qlora.calibration import CalibrationReport
from lightning_qlora.linear import adapted_layers
from lightning_qlora.packed_linear import BASE


@dataclass
class ConversionReport:
    """What became 4-bit, what did not and why, and what that saves.

    Attributes:
        converted: Names of the layers that are 4-bit with an adapter now.
        trained_in_full: Name -> why a module trains without 4 bits and without an adapter.
        skipped: Name -> why a linear layer stays as it came, frozen.
        trainable_parameters: Number of parameters that train.
        total_parameters: Number of parameters, the adapters included; a 4-bit weight counts its weights, not its bytes.
        bytes_before: Bytes of the parameters as the module came.
        bytes_after: Bytes of the parameters now, the adapters included.
        seconds: Time of the conversion.
        shapes: Name -> (out_features, in_features) of the converted layers.
        calibration: What becomes of adapters that start with the first training batch; None for other starts.
    """

    converted: list[str]
    trained_in_full: dict[str, str]
    skipped: dict[str, str]
    trainable_parameters: int
    total_parameters: int
    bytes_before: int
    bytes_after: int
    seconds: float
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    calibration: CalibrationReport | None = None

    def rows(self) -> list[tuple[str, str, str]]:
        """Layer group, what became of it, how many; layers whose names differ by a number alone are one group."""
        groups: Counter[tuple[str, str]] = Counter()
        for name in self.converted:
            rows, columns = self.shapes[name]
            groups[_group(name), f"4-bit + adapter, {rows}x{columns}"] += 1
        for kept, verb in ((self.trained_in_full, "trains in full"), (self.skipped, "left alone")):
            for name, reason in kept.items():
                groups[_group(name), f"{verb}: {reason}"] += 1
        return [(name, what, str(count)) for (name, what), count in groups.items()]

    def summary(self) -> str:
        """Parameters, bytes and time, and what is still to come."""
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        return (
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train ({share:.2f}%)\n"
            f"parameters take {size_text(self.bytes_after)}, {size_text(self.bytes_before)} before; "
            f"converted {len(self.converted)} layers in {self.seconds:.1f} s"
            + (f"\n{self.calibration}" if self.calibration else "")
        )

    def __str__(self) -> str:
        lines = [f"{name}  x{count}  {what}" for name, what, count in self.rows()]
        return "\n".join(["QLoRA", *lines, self.summary()])

    def show(self) -> None:
        """Print a table where rich is installed, else plain lines."""
        try:
            from rich.console import Console
            from rich.table import Column, Table
        except ImportError:
            print(self)
            return
        table = Table(
            Column("layer", overflow="fold"),
            "what became of it",
            "layers",
            title="QLoRA",
            title_justify="left",
            caption=self.summary(),
        )
        table.caption_justify = "left"
        for row in self.rows():
            table.add_row(*row)
        Console().print(table)


def count_parameters(module: nn.Module) -> tuple[int, int, int]:
    """Parameters that train, all parameters, their bytes; a shared one counts once, a 4-bit weight by its weights."""
    packed = {
        id(parameter): layer.weight_bytes.numel if key == "packed" else 0
        for layer in adapted_layers(module).values()
        for key, parameter in layer._parameters.items()
        if key in BASE
    }
    parameters = list(module.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return trainable, sum(packed.get(id(p), p.numel()) for p in parameters), sum(p.nbytes for p in parameters)


def dense_bytes(module: nn.Module) -> int:
    """Bytes of the parameters without adapters and with every 4-bit weight in the type it came in."""
    layers = adapted_layers(module).values()
    own = {id(p) for layer in layers for key, p in layer._parameters.items() if key != "bias" and p is not None}
    dense = sum(layer.weight_bytes.numel * layer.weight_dtype.itemsize for layer in layers)
    return dense + sum(p.nbytes for p in module.parameters() if id(p) not in own)


def _group(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) or "(the module itself)"


def size_text(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
