"""Adapter: all adapters of a model as one value, with the names that PEFT uses; whether it breaks a tie of weights."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mode
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.names import without_wrappers
from lightning_qlora.layers.trainable_tokens import DELTA
from lightning_qlora.quantization.packed_weight import PackedWeight

BASE_LAYER = ".base_layer"  # of PEFT's wrapper in a wrapper
PREFIX = "base_model.model."  # PEFT's, before the name of every parameter
MAGNITUDE = "lora_magnitude_vector"  # PEFT's name of DoRA's magnitudes
ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LayerAdapter:
    """The adapter of one layer: lora_A [r, in], lora_B [out, r], its alpha, and DoRA's magnitudes [out].

    That of a stack of experts is [experts, r, in], [experts, out, r] and [experts, out]. `initial` are the lora_A and
    lora_B that training began with, if they were computed from the weight and are known.
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    magnitude: Tensor | None = None
    initial: tuple[Tensor, Tensor] | None = None

    @property
    def r(self) -> int:
        """Rank."""
        return self.lora_A.shape[-2]


class ExpertStack(NamedTuple):
    """The experts of one parameter, and how PEFT writes their adapters.

    Attributes:
        number: Number of experts.
        wrappers: How many of PEFT's wrappers are around the one of this parameter.
        transposed: The parameter is [experts, in, out].
        swapped_by_peft: PEFT takes its inputs for outputs, so PEFT's lora_A is lora_B^T, and the reverse.
        flat: The parameter is [experts * out, in].
    """

    number: int
    wrappers: int
    transposed: bool
    swapped_by_peft: bool
    flat: bool


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The adapters of a model; names are those in the base model.

    Attributes:
        layers: Name of a layer, or of a parameter of experts -> its adapter.
        experts: Name of a parameter of experts -> how PEFT writes its adapter.
        expert_adapters: Name in a folder -> its adapters, if there are `target_parameters`, until the model says which
            parameters and layers they are for (`peft_experts.assign_parameters`).
        peft_config: Content of that folder's adapter_config.json.
        as_parameters: Names of linear layers that PEFT adapts only as `target_parameters`.
        saved: Name of a parameter or buffer -> value, of the modules that were trained in full.
        modules_to_save: Names of those modules.
        tokens: Name of an embedding of which some rows were trained -> their indices; `saved` has the rows.
        target_modules: PEFT's target_modules.
        use_rslora: Whether the scaling is alpha / sqrt(r) instead of alpha / r.
        fan_in_fan_out: Whether the layers are transformers' Conv1D, which stores its weight as [in, out].
        lora_dropout: Dropout probability in training.
        task_type: PEFT's task type, or None.
        base_model: Folder or hub name of the base model, or None.
        quantization: `base_compatibility.quantization_of` of the training, if known.
        bases: Name of a layer -> the 4-bit weight of each of its matrices, if it is stored with the adapters.
        base_fingerprints: Name of a layer -> fingerprint of its 4-bit weight, if known; in folders, if the
            initialization changed it. Of a checkpoint also those of other frozen parameters.
        source: The file that the tensors came from, for messages.
    """

    layers: dict[str, LayerAdapter]
    experts: dict[str, ExpertStack] = field(default_factory=dict)
    expert_adapters: dict[str, LayerAdapter] = field(default_factory=dict)
    peft_config: dict[str, Any] = field(default_factory=dict)
    as_parameters: frozenset[str] = frozenset()
    saved: dict[str, Tensor]
    modules_to_save: list[str]
    tokens: dict[str, list[int]]
    target_modules: str | list[str]
    use_rslora: bool
    fan_in_fan_out: bool
    lora_dropout: float
    task_type: str | None
    base_model: str | None
    quantization: dict[str, Any] | None
    bases: dict[str, list[PackedWeight]] = field(default_factory=dict)
    base_fingerprints: dict[str, int]
    source: str = "adapter_model.safetensors"

    def __post_init__(self) -> None:
        if self.base_model in ("", "None"):  # transformers' name of a model that was not loaded from a folder
            object.__setattr__(self, "base_model", None)

    @property
    def use_dora(self) -> bool:
        """Whether the layers have DoRA's magnitudes."""
        return any(layer.magnitude is not None for layer in self.layers.values())

    @property
    def r(self) -> int:
        """The rank of most layers."""
        return mode(layer.r for layer in self.layers.values())

    @property
    def alpha(self) -> float:
        """The alpha of most layers."""
        return mode(round_alpha(layer.alpha) for layer in self.layers.values())

    @property
    def rank_pattern(self) -> dict[str, int]:
        """Ranks of the other layers, by PEFT's names."""
        usual = self.r
        return {self.name_in_peft(name): layer.r for name, layer in self.layers.items() if layer.r != usual}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """Alphas of the other layers, by PEFT's names."""
        usual = self.alpha
        alphas = {name: round_alpha(layer.alpha) for name, layer in self.layers.items()}
        return {self.name_in_peft(name): alpha for name, alpha in alphas.items() if alpha != usual}

    @property
    def targets(self) -> set[str]:
        """Names of the model's modules and expert parameters that have an adapter here."""
        return {*self.layers, *map(outermost, self.expert_adapters)}

    def name_in_peft(self, name: str) -> str:
        """Name of the layer, or of the parameter, that PEFT adapts."""
        return f"{name}.weight" if name in self.as_parameters else name

    @property
    def target_parameters(self) -> list[str]:
        """PEFT's target_parameters."""
        return sorted([*self.experts, *(f"{name}.weight" for name in self.as_parameters)])

    def scaling(self, name: str) -> float:
        """The factor s of a layer's product B A."""
        layer = self.layers[name]
        if self.use_rslora:
            return layer.alpha / math.sqrt(layer.r)
        return layer.alpha / layer.r


def outermost(key: str) -> str:
    """Name of the module that a key in a folder is for."""
    return re.sub(rf"({re.escape(BASE_LAYER)})+$", "", key)


def round_alpha(alpha: float) -> float | int:
    """An alpha that was computed from a scaling, without its rounding error; an int if it is a whole number."""
    rounded = round(alpha, 9)
    return int(rounded) if rounded == int(rounded) else rounded


def tied_names(base: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several; rows of embeddings that train are excluded, as PEFT ties them."""
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if not name.endswith(DELTA):
            names.setdefault(id(parameter), []).append(without_wrappers(name))
    return [group for group in names.values() if len(group) > 1]


def is_one_weight(adapter: Adapter, tied: Sequence[str]) -> bool:
    """Whether an adapter has no value for a tied weight, or the same value for all of its names."""
    values = [adapter.saved[name] for name in tied if name in adapter.saved]
    return not values or (len(values) == len(tied) and all(torch.equal(values[0], value) for value in values))


def check_tie(adapter: Adapter, tied: Sequence[str]) -> None:
    """Refuse an adapter with a value for some names of a tied weight only, or with different values.

    PEFT trains a copy of a module in modules_to_save and leaves the weight that it was tied to unchanged, unless
    `ensure_weight_tying` is set.
    """
    if is_one_weight(adapter, tied):
        return
    trained = next(name for name in tied if name in adapter.saved)
    others = ", ".join(name for name in tied if name != trained)
    raise CheckpointMismatchError(
        f"{adapter.source}: key '{PREFIX}{trained}' was trained separately from {others}, and in this base they are "
        "one tied weight: it would be a different model. Train with ensure_weight_tying=True (PEFT's LoraConfig)."
    )
