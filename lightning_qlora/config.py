"""QLoRAConfig: every choice a user can make, checked once, at construction."""

import math
import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

QuantType = Literal["nf4", "fp4", "int4"]
ComputeDtype = Literal["auto", "bf16", "fp16", "fp32"]
InitLoRAWeights = Literal["default", "gaussian", "loftq", "pissa", "calibrated"]
Checkpoint = Literal["adapter", "full"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class QLoRAConfig:
    """The arguments of `QLoRAPrecision` and `convert`, with the paper's recipe as defaults.

    Args:
        quant_type: 4-bit data type of the frozen weights.
        double_quant: Quantize the block scales again, to 8 bits (paper section 3: 0.37 bit a weight less).
        block_size: Weights that share one scale: 32 to 4096, a power of two.
        compute_dtype: Type the 4-bit weights are decoded to for each product. "auto": the type of the weight that was
            replaced, and bf16 instead of fp32 on a GPU that has bf16.
        r: Rank of the adapters.
        lora_alpha: The adapter's product is scaled by lora_alpha / r.
        lora_dropout: Probability of dropping an input of an adapter in training.
        target_modules: Layers to convert: "all-linear", one regular expression for the whole name, or a list of name
            endings, as in PEFT.
        exclude_modules: Layers to leave alone: a regular expression or a list of name endings.
        modules_to_save: Modules to train in full beside the adapters: a list of name endings.
        init_lora_weights: Where the adapters start.
        use_rslora: Scale by lora_alpha / sqrt(r) instead.
        use_dora: Learn the magnitude of every output row as well (weight-decomposed LoRA).
        paged_optimizer: Page optimizer state to host memory: True, False, or "auto" (on for CUDA devices).
        gradient_checkpointing: Recompute activations in the backward pass.
        checkpoint: What a checkpoint holds: the "adapter" (and what else trains), or the packed base as well ("full").
        adapter: Folder of a PEFT adapter to start from.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not among the allowed ones.
    """

    quant_type: QuantType = "nf4"
    double_quant: bool = True
    block_size: int = 64
    compute_dtype: ComputeDtype = "auto"
    r: int = 64
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)
    init_lora_weights: InitLoRAWeights = "default"
    use_rslora: bool = False
    use_dora: bool = False
    paged_optimizer: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool = False
    checkpoint: Checkpoint = "adapter"
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_choice("quant_type", self.quant_type, get_args(QuantType))
        check_choice("compute_dtype", self.compute_dtype, get_args(ComputeDtype))
        check_choice("init_lora_weights", self.init_lora_weights, get_args(InitLoRAWeights))
        check_choice("checkpoint", self.checkpoint, get_args(Checkpoint))
        check_choice("block_size", _integer("block_size", self.block_size), BLOCK_SIZES)
        for name in ("double_quant", "use_rslora", "use_dora", "gradient_checkpointing"):
            check_bool(name, getattr(self, name))
        if _integer("r", self.r) < 1:
            raise ValueError(f"r={self.r!r}: the rank of the adapters must be 1 or more.")
        if not (math.isfinite(_number("lora_alpha", self.lora_alpha)) and self.lora_alpha > 0):
            raise ValueError(f"lora_alpha={self.lora_alpha!r}: must be a finite number above 0.")
        if not 0 <= _number("lora_dropout", self.lora_dropout) < 1:
            raise ValueError(
                f"lora_dropout={self.lora_dropout!r}: must be a probability from 0 up to, not including, 1."
            )
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            _check_names(name, getattr(self, name), regex_allowed=name != "modules_to_save")
        if self.paged_optimizer != "auto":
            if not isinstance(self.paged_optimizer, (bool, str)):
                raise TypeError(f"paged_optimizer={self.paged_optimizer!r}: must be True, False or 'auto'.")
            if isinstance(self.paged_optimizer, str):
                raise ValueError(f"paged_optimizer={self.paged_optimizer!r}: must be True, False or 'auto'.")
        if self.adapter is not None:
            if not isinstance(self.adapter, str):
                raise TypeError(f"adapter={self.adapter!r}: must be the path of a folder, or None.")
            if not os.path.isfile(os.path.join(self.adapter, "adapter_config.json")):
                raise ValueError(
                    f"adapter={self.adapter!r}: must be a folder that holds an adapter_config.json (PEFT's)."
                )
        if self.target_modules in ("", []):
            raise ValueError(
                f"target_modules={self.target_modules!r} chooses no layer: use 'all-linear', a regular expression, "
                "or a list of name endings such as ['q_proj', 'v_proj']."
            )

    @property
    def scaling(self) -> float:
        """The factor s of the adapter's product: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if isinstance(value, bool) or not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}.")


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be True or False, not {type(value).__name__}.")


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: must be a whole number, not {type(value).__name__}.")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: must be a number, not {type(value).__name__}.")
    return value


def _check_names(name: str, value: Any, regex_allowed: bool) -> None:
    if isinstance(value, str) and regex_allowed:
        check_regex(name, value)
    elif not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        allowed = "a regular expression or a list of name endings" if regex_allowed else "a list of name endings"
        raise TypeError(f"{name}={value!r}: must be {allowed}, each a non-empty string.")


def check_regex(name: str, value: str) -> None:
    """Raise ValueError unless `value` compiles as a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name}={value!r}: not a valid regular expression ({error}).") from error
