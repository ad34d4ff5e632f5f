"""Adapter: the two files of a PEFT folder as values, with the names of the base model."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_qlora.checks import DAMAGED, DIVERGED, check_finite
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.names import name_endings
from lightning_qlora.quantization.packed_weight import PackedWeight
from lightning_qlora.selection.patterns import Patterns
from lightning_qlora.survey.parts import Parts
from lightning_qlora.texts import printable

State = dict[str, Tensor]  # the adapter of a layer by its own names: lora_A, lora_B, with DoRA lora_magnitude_vector
MAGNITUDE = "lora_magnitude_vector"  # PEFT's name of DoRA's magnitudes, and that of the layers
BASE_LAYER = ".base_layer"  # of PEFT's wrapper in a wrapper
PREFIX = "base_model.model."  # PEFT's, before the name of every parameter
ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A PEFT folder, or what a module or checkpoint would write as one.

    Attributes:
        config: Content of adapter_config.json, with what `read_peft_config` fills in.
        layers: PEFT's name of a layer -> its tensors; those of experts have PEFT's form (`peft_layers.py`).
        saved: Name of a parameter or buffer -> value, of the modules that trained in full, and of rows of tokens.
        quantization: How the base of the training was quantized and the adapters initialized, a `Quantization`, if
            known.
        fingerprints: Name of a layer, or of a parameter of experts -> fingerprint of its 4-bit weight, if known; in
            folders, if the checkpoint held it. Of a checkpoint also those of other frozen parameters.
        bases: Name of a layer -> the 4-bit weight of each of its matrices, if the checkpoint has it.
        no_place: Why PEFT has no such adapter, if it has none: it can be loaded and merged, and not be written.
        source: The file that the tensors came from, for messages.
    """

    config: dict[str, Any]
    layers: dict[str, State]
    saved: State
    quantization: Any = None
    fingerprints: dict[str, int] = field(default_factory=dict)
    bases: dict[str, list[PackedWeight]] = field(default_factory=dict)
    no_place: str = ""
    source: str

    @cached_property
    def target_parameters(self) -> frozenset[str]:
        return frozenset(self.config.get("target_parameters") or ())

    def is_target(self, parameter: str) -> bool:
        return not self.target_parameters.isdisjoint(name_endings(parameter))

    @cached_property
    def modules(self) -> dict[str, list[str]]:
        """Name of a module with an adapter, or with parameters that have one -> the names in `layers`."""
        modules: dict[str, list[str]] = {}
        for key in self.layers:
            name = key
            if self.target_parameters:  # else a layer may be called so
                name = re.sub(rf"({re.escape(BASE_LAYER)})+$", "", key)
            modules.setdefault(name, []).append(key)
        return modules

    def alpha(self, name: str) -> float:
        """Alpha of a layer or parameter: that of the first pattern that matches (peft.utils.other.get_pattern_key)."""
        return float(self._by_pattern("alpha_pattern", name, "lora_alpha"))

    def rank(self, name: str) -> int:
        """The rank of a layer or parameter: the matrices of experts have that of all of them."""
        if not self.target_parameters:
            return len(self.layers[name]["lora_A"])
        return int(self._by_pattern("rank_pattern", name, "r"))

    @cached_property
    def ranks(self) -> set[int]:
        """The ranks of layers; PEFT writes the patterns in another order, so which layer has which is not known."""
        return {self.config["r"], *self.config["rank_pattern"].values()}

    def _by_pattern(self, pattern: str, name: str, default: str) -> Any:
        if not self.config[pattern]:
            return self.config[default]
        if self.is_target(f"{name}.weight"):
            name += ".weight"
        return self._patterns[pattern].value([name], self.config[default])

    @cached_property
    def _patterns(self) -> dict[str, Patterns]:
        return {pattern: Patterns(self.config[pattern]) for pattern in ("rank_pattern", "alpha_pattern")}

    @property
    def tokens(self) -> dict[str, list[int]]:
        return self.config.get("trainable_token_indices") or {}

    def check_sizes(self, key: str, base: Parts, what: str, matrices: int, sizes: tuple[int, int]) -> None:
        """`sizes`: outputs and inputs of `what`, as PEFT counts them; it has the ranks of all matrices in one."""
        a, b = (list(self.layers[key][part].shape) for part in ("lora_A", "lora_B"))
        outputs, inputs = sizes
        if (a[1], b[0]) != (inputs, outputs) or a[0] not in {matrices * rank for rank in self.ranks}:
            difference = f"has {what} of {inputs} inputs and {outputs} outputs there, the adapter has lora_A {a} and"
            self.refuse(f"{key}.lora_A.weight", base, f"{difference} lora_B {b}")

    def refuse(self, key: str, base: Parts, difference: str) -> NoReturn:
        kind = type(base.root).__name__
        raise CheckpointMismatchError(
            f"{self.source}: key '{PREFIX}{printable(key)}' does not fit: the {kind} {difference}. An adapter fits the "
            "architecture it was trained on, converted with its target_modules (pass adapter=FOLDER to QLoRAPrecision)."
        )

    def has_one_value(self, tied: list[str]) -> bool:
        """Whether `saved` has no value for the names of a tied weight, or the same value for all of them."""
        values = [self.saved[name] for name in tied if name in self.saved]
        return not values or (len(values) == len(tied) and all(torch.equal(values[0], value) for value in values))


def check_state(key: str, state: State, dimensions: Collection[int] = (2,)) -> None:
    """Raise ValueError, with the key, for tensors of a file that no layer has."""
    a: Any = state["lora_A"].shape if "lora_A" in state else ()
    b: Any = state["lora_B"].shape if "lora_B" in state else ()
    good = len(a) == len(b) and len(a) in dimensions and a[:-2] == b[:-2] and a[-2] == b[-1] and 0 not in (*a, *b)
    if MAGNITUDE in state:
        good = good and state[MAGNITUDE].shape == b[:-1]
    if not good or any(tensor.dtype not in ADAPTER_DTYPES for tensor in state.values()):
        shapes = ", ".join(f"{part} {list(tensor.shape)} of {tensor.dtype}" for part, tensor in state.items())
        raise ValueError(
            f"{key} the file has {shapes}: a layer has lora_A [r, in] and lora_B [out, r], of rank 1 or more, with "
            f"DoRA {MAGNITUDE} [out], and all are float16, bfloat16, float32 or float64. {DAMAGED}"
        )
    for part, tensor in state.items():
        check_finite(f"{key} {part}", tensor.float(), DIVERGED)  # a float64 may be too large for fp32
