"""ConversionReport: the status of every layer after conversion, with what a user should look at."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_qlora.conversion.parameter_counts import count_parameters
from lightning_qlora.dtypes.full_precision import autocast_type
from lightning_qlora.selection.selection import Selection
from lightning_qlora.survey.parts import Parts
from lightning_qlora.tensors.device_types import Held
from lightning_qlora.tensors.held_types import TYPES, full_precision_parameters, held_bytes
from lightning_qlora.texts import ROOT, group, groups, size_text

KEPT_IN = {
    torch.float32: "fp32 and computes in it ({} more)",
    torch.bfloat16: "bf16, which rounds each value to 8 of its 11 bits, and computes in it",
}
NOTHING_PRETRAINED = (
    "nothing looks pretrained: its values are those of an initialization, and QLoRA freezes them at random. Load the "
    "weights in __init__ or configure_model, before fit; or train it without the plugin"
)
MARK = "! "  # of a row that a user should look at


@dataclass(repr=False)
class ConversionReport:
    """The status of every layer after conversion, and the numbers of parameters and bytes.

    Attributes:
        converted: Names of the layers that are 4-bit with an adapter, and of the parameters of experts.
        trained_in_full: Name -> reason, of modules that train without 4 bits and without an adapter.
        skipped: Name -> reason, of linear layers that are not converted and frozen.
        trainable_parameters: Number of parameters that train.
        total_parameters: Number of all parameters, adapters included; a 4-bit weight counts as its weights.
        bytes_before: Bytes of the parameters before conversion.
        bytes_after: Bytes of the parameters now, adapters included.
        seconds: Time of the conversion.
        shapes: Name -> (out_features, in_features) of the converted layers; of experts, their number comes first.
        frozen: Names of modules and parameters that conversion froze, without the linear layers.
        adapter_parameters: Number of parameters of all adapters, and of the rows that train.
        trained_rows: Name of an embedding -> how many of its rows train; tied ones by the first name.
        deferred_logits: Name of each output embedding whose logits are deferred -> bytes that a step saves for each
            1,000 tokens (`deferred_head.saved_bytes`); 0 if they are not deferred, because a strategy shards the weight
            or its adapter has dropout.
        full_precision_bytes: Bytes of the parameters that train in full, are kept in fp32 and compute in 16 bits.
        full_precision_computes_in: The types that they compute in: "bfloat16", "float16"; without those below.
        held: The type that the module is kept in and computes in, with the reason, for each 16-bit type that it had;
            empty: its own.
        held_bytes: Bytes that this takes more.
        calibration: Status of adapters that are initialized from the first step (`CalibrationReport`); None if
            none are.
        unused: Name -> reason, of layers whose adapters got no gradient; known after the first step.
        activations: With gradient_checkpointing="auto" or bytes the `ActivationBudget`, whose text says how many blocks
            of the last step kept their activations; None: all blocks are recomputed, or none.
        notes: What a user should look at -> names of the modules and parameters that it is about. These rows stand
            first, with a mark.

    Example:
        ```python
        from lightning_qlora import convert
        from torch import nn

        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        report = convert(model, r=4, target_modules=["0"])
        print(report)  # a table
        print(report.converted, report.skipped, report.trainable_parameters)
        ```
    """

    converted: list[str] = field(default_factory=list)
    trained_in_full: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    trainable_parameters: int = 0
    total_parameters: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    adapter_parameters: int = 0
    trained_rows: dict[str, int] = field(default_factory=dict)
    deferred_logits: dict[str, int] = field(default_factory=dict)
    full_precision_bytes: int = 0
    full_precision_computes_in: list[str] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    held_bytes: int = 0
    calibration: Any = None
    unused: dict[str, str] = field(default_factory=dict)
    activations: Any = None
    notes: dict[str, list[str]] = field(default_factory=dict)

    def count(self, parts: Parts) -> None:
        """Count the layers, parameters and bytes of the module that was converted."""
        self.trainable_parameters, self.total_parameters, self.bytes_after, *_ = count_parameters(parts.modules)
        self.converted = list(parts.layers)
        self.shapes = {name: layer._shape for name, layer in parts.layers.items()}
        self.trained_rows = {name: part.row_count for name, part in parts.adapters.items() if part.row_count}
        parameters = [p for adapter in parts.adapters.values() for p in adapter.adapter_parameters()]
        self.adapter_parameters = sum(parameter.numel() for parameter in parameters)
        self.full_precision_computes_in = []
        self.full_precision_bytes = self.held_bytes = 0
        if any(TYPES in vars(part) for part in parts.modules):
            self.full_precision_bytes = sum(value.nbytes for _, value, _ in full_precision_parameters(parts.named))
            self.held_bytes = held_bytes(parts.named)
            dtype = autocast_type(parts.root)
            if dtype is not None and self.full_precision_bytes:
                self.full_precision_computes_in = [str(dtype).removeprefix("torch.")]

    def note(self, text: str, names: Iterable[str] = ("",)) -> list[str]:
        """Add rows with a mark, and return the names that this text did not have; "" is the module itself."""
        known = dict.fromkeys(self.notes.get(text, ()))
        new = [name for name in names if name not in known]
        if new:
            self.notes[text] = [*known, *new]
        return new

    def tell(self, text: str, names: Iterable[str] = ("",)) -> None:
        """Add rows with a mark after the report was printed, and print a line with them."""
        new = self.note(text, names)
        if new:
            say(f"{groups(new)}: {text}.")

    def marked_rows(self) -> str:
        """The rows with a mark, a line each; "" if there are none."""
        return _lines(row for row in self.rows() if row[1].startswith(MARK))

    def take(self, choice: Selection) -> None:
        """Take the rows of what is not converted."""
        self.trained_in_full = choice.train
        self.skipped = choice.skip

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, status and number of layers or parameters whose names differ only in a number."""
        each = [(name, MARK + text) for text, names in self.notes.items() for name in names]
        each += [(name, f"{MARK}no gradient in the first step: {reason}") for name, reason in self.unused.items()]
        for name in sorted(self.converted, key=lambda name: -len(self.shapes[name])):  # experts first
            *counts, rows, columns = self.shapes[name]
            prefix = "".join(f"{count} experts of " for count in counts)
            each.append((name, f"4-bit + adapter, {prefix}{rows}x{columns}"))
        each += [(name, f"trains in full: {reason}") for name, reason in self.trained_in_full.items()]
        each += [(name, f"skipped: {reason}") for name, reason in self.skipped.items()]
        each += [(name, f"{count} rows train, the others are frozen") for name, count in self.trained_rows.items()]
        each += [(name, "frozen by conversion") for name in self.frozen]
        names_of: dict[tuple[str, str], list[str]] = {}
        for name, status in each:
            names_of.setdefault((group(name), status), []).append(name or ROOT)
        return [
            (names[0] if len(names) == 1 else name, status, str(len(names)))
            for (name, status), names in names_of.items()
        ]

    def summary(self) -> str:
        """Parameters, bytes, time, deferred logits, and the calibration."""
        share = 100 * self.trainable_parameters / self.total_parameters
        first = f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train ({share:.2f}%)"
        in_full = self.trainable_parameters - self.adapter_parameters
        if in_full > 0:
            first += f": {self.adapter_parameters:,} in adapters and {in_full:,} in full"
        lines = [first]
        for dtype in dict.fromkeys(held.dtype for held in self.held):
            lines.append(
                f"{'; '.join(held.reason for held in self.held if held.dtype is dtype)}: so all but the 4-bit weights "
                f"is kept in {KEPT_IN[dtype].format(size_text(self.held_bytes))}; files and merged weights have the "
                "types of before"
            )
        if self.full_precision_computes_in:
            lines.append(
                f"what trains in full is kept in fp32 ({size_text(self.full_precision_bytes)}) and computes in "
                f"{' and '.join(self.full_precision_computes_in)}"
            )
        lines.append(
            f"parameters take {size_text(self.bytes_after)}, {size_text(self.bytes_before)} before; "
            f"converted {len(self.converted)} layers in {self.seconds:.1f} s"
        )
        for name, count in self.deferred_logits.items():
            how = "not deferred (sharded, or its adapter has lora_dropout)"
            if count:
                how = f"deferred, saves {size_text(count)} for each 1,000 tokens"
            lines.append(f"logits of {name or ROOT}: {how}")
        if self.activations is not None:
            lines.append(f"gradient checkpointing: {self.activations}")
        if self.calibration is not None:
            lines.append(str(self.calibration))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"ConversionReport({len(self.converted)} layers in 4 bits, {len(self.trained_in_full)} trained in full, "
            f"{len(self.skipped)} skipped, {self.trainable_parameters:,} of {self.total_parameters:,} parameters train)"
        )

    def _repr_html_(self) -> str:
        table = "<tr><th>layer</th><th>status</th><th>layers</th></tr>"
        for row in self.rows():
            table += f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        return f"<table>{table}</table><pre>{escape(self.summary())}</pre>"

    def __str__(self) -> str:
        return "\n".join(["QLoRA", _lines(self.rows()), self.summary()])


def _lines(rows: Iterable[tuple[str, str, str]]) -> str:
    rows = [*rows]
    width = max((len(name) for name, _, _ in rows), default=0)
    return "\n".join(f"{name:{width}}  x{count:3} {status}" for name, status, count in rows)


@rank_zero_only
def say(text: str) -> None:
    print(f"QLoRA: {text}")
