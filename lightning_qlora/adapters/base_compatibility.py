"""Which base model an adapter fits, and the same adapter for the base in 16 or 32 bits.

    default, gaussian     B = 0 at first: also fits the base in 16 or 32 bits, where the outputs differ from training
    calibrated            initialized from the quantization error: fits the base quantized in the same way

Checkpoints and adapter folders store the arguments that decide it (`Quantization`). Loading an adapter records its
initialization in the layers, so that the module can be saved again.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from lightning_qlora.adapters.adapter import MAGNITUDE, Adapter, State
from lightning_qlora.checks import DAMAGED, RemovedStartError
from lightning_qlora.config import InitLoRAWeights, QLoRAConfig, QuantType
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.starts.starts import corrects_error

DEFAULT_CONFIG = QLoRAConfig()


class Quantization(NamedTuple):
    """How a base is quantized and its adapters are initialized: arguments of `QLoRAConfig`, in the order of files."""

    quant_type: QuantType = "nf4"
    block_size: int = 64
    double_quant: bool = True
    init_lora_weights: InitLoRAWeights = "default"

    @classmethod
    def of(cls, layer: LoRALayer) -> "Quantization":
        """That of a layer, whose weight may have been loaded in 4 bits."""
        has_nested = layer.nested.numel() > 0
        return cls(layer.quant_type, layer.block_size, has_nested, layer.config.init_lora_weights)

    def entry(self) -> dict[str, Any]:
        """Plain values, for files."""
        return {**self._asdict(), "base_changed": False}  # earlier versions read the last one

    def bits(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in zip(self._fields[:-1], self, strict=False))


def read_quantization(entry: Any, source: str, config: QLoRAConfig = DEFAULT_CONFIG) -> Quantization | None:
    """The reverse of `Quantization.entry`; None for None, and ValueError, with the source, for another value.

    It is checked if it differs from that of the config.
    """
    if entry is None:
        return None
    try:
        quantization = Quantization._make([entry[name] for name in Quantization._fields])
        config.changed(**quantization._asdict())
    except RemovedStartError as error:
        raise RemovedStartError(f"{source}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}. {DAMAGED}") from error
    return quantization


def check_one_folder(configs: Mapping[str, QLoRAConfig]) -> None:
    """Raise ValueError if layers, by name, differ in an argument that an adapter folder has once."""
    first, first_config = next(iter(configs.items()))
    for name, config in configs.items():
        for key in (*Quantization._fields, "use_dora"):
            expected = getattr(first_config, key)
            value = getattr(config, key)
            if value != expected:
                raise ValueError(
                    f"{first} has {key}={expected!r} and {name} has {key}={value!r}: an adapter folder has one value "
                    "for all layers. Use a Lightning checkpoint, merge the adapters, or convert both with the same "
                    "value."
                )


def required_base(quantization: Quantization | None) -> str | None:
    """A sentence on the base that adapters initialized this way need; None if the float base also fits."""
    if quantization is None or not corrects_error(quantization):
        return None
    return (
        f"These adapters were initialized as {quantization.init_lora_weights!r}, from the quantization error: they fit "
        f"the model in 4 bits ({quantization.bits()}). For a model in 16 bits export their difference from the initial "
        "values (base='float')."
    )


def trained_on(quantization: Quantization | None) -> str:
    """A sentence on the base that adapters were trained on, and what to do for another base."""
    if quantization is None:
        return "not recorded"
    return required_base(quantization) or (
        f"the model in 4 bits ({quantization.bits()}). On the model in 16 bits its outputs differ from those in "
        "training, because the weights do: merge it (lightning-qlora merge) to keep them."
    )


def check_required_base(adapter: Adapter, layers: Mapping[str, LoRALayer]) -> None:
    """Raise CheckpointMismatchError for an adapter that needs other 4-bit weights than these layers have."""
    trained = adapter.quantization
    if trained is None or not corrects_error(trained):
        return
    for name, layer in layers.items():
        here = Quantization.of(layer)
        if here[:-1] != trained[:-1]:
            raise CheckpointMismatchError(
                f"{adapter.source}: does not fit {name}: the adapter was initialized as {trained.init_lora_weights!r} "
                f"from the error of quantization to {trained.bits()}, and here it is {here.bits()}. Use the same "
                "quantization, or export the checkpoint that it came from with base='float', for a base in 16 bits."
            )


def subtract_initial(layers: Mapping[str, State], source: str) -> dict[str, State]:
    """The same adapters for the base in 16 or 32 bits: their differences from the initial values, of rank 2 r.

    With the float weight W in place of the 4-bit base, the trained layer is (up to the part of the quantization error
    that the initial values A0 and B0 did not correct)

        W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]        an adapter of rank 2 r with the same s (as PEFT's for PiSSA)

    Without initial values B must be 0. ValueError if they are not known.
    """
    differences = {}
    for name, state in layers.items():
        if MAGNITUDE in state:
            raise ValueError(
                f"{source}: with DoRA the difference from the initial values is no adapter of rank 2 r. Merge the "
                "adapter instead."
            )
        values = {part: value.to(state["lora_A"].device).float() for part, value in state.items()}
        a = values["lora_A"]
        b = values["lora_B"]
        if "initial_A" in values:
            a = torch.cat([a, values["initial_A"]], dim=-2)
            b = torch.cat([b, -values["initial_B"]], dim=-1)
        elif b.any():
            raise ValueError(
                f"{source}: {name}: its initial values are not known, because an adapter folder does not hold them. "
                "Export with base='float' from the checkpoint, or the module, in which it was initialized."
            )
        differences[name] = {"lora_A": a, "lora_B": b}
    return differences
