"""QLoRAConfig: every choice a user can make, checked once, at construction."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args

T = TypeVar("T")

QuantType = Literal["nf4", "fp4", "int4"]
ComputeDtype = Literal["auto", "bf16", "fp16", "fp32"]
Onto = Literal["decoded", "float"]  # the base that adapters are added to: as in training, or as it was before
InitLoRAWeights = Literal["default", "gaussian", "loftq", "pissa", "calibrated"] | str  # or "pissa_niter_16"
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
        init_lora_weights: Where the adapters start: "default" (PEFT's: B = 0), "gaussian" (B = 0), "loftq", "pissa",
            "pissa_niter_16" (with 16 power iterations, faster), or "calibrated" on the first training batches.
        loftq_config: For "loftq", as in PEFT, and for "pissa": {"loftq_iter": 5} for 5 iterations instead of 1.
        calibration_batches: For "calibrated": batches to look at before the first step; None: those of the first step.
        use_rslora: Scale by lora_alpha / sqrt(r) instead.
        use_dora: Learn the magnitude of every output row as well (weight-decomposed LoRA).
        rank_pattern: Rank of single layers, {name ending or regular expression: r}, as in PEFT.
        alpha_pattern: lora_alpha of single layers, likewise.
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
    loftq_config: dict[str, int] = field(default_factory=dict)
    calibration_batches: int | None = None
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    paged_optimizer: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool = False
    checkpoint: Checkpoint = "adapter"
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_choice("quant_type", self.quant_type, get_args(QuantType))
        check_choice("compute_dtype", self.compute_dtype, get_args(ComputeDtype))
        _check_start(self.init_lora_weights, self.loftq_config, self.calibration_batches)
        check_choice("checkpoint", self.checkpoint, get_args(Checkpoint))
        check_choice("block_size", _integer("block_size", self.block_size), BLOCK_SIZES)
        for name in ("double_quant", "use_rslora", "use_dora", "gradient_checkpointing"):
            check_bool(name, getattr(self, name))
        if _integer("r", self.r) < 1:
            raise ValueError(f"r={self.r!r}: the rank of the adapters must be 1 or more.")
        _check_alpha("lora_alpha", self.lora_alpha)
        for pattern, r in _patterns("rank_pattern", self.rank_pattern):
            if _integer(f"rank_pattern[{pattern!r}]", r) < 1:
                raise ValueError(f"rank_pattern[{pattern!r}]={r!r}: the rank of the adapters must be 1 or more.")
        for pattern, alpha in _patterns("alpha_pattern", self.alpha_pattern):
            _check_alpha(f"alpha_pattern[{pattern!r}]", alpha)
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
        """The factor s of an adapter whose layer no pattern names."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def rank_of(self, name: str) -> int:
        """Rank of a layer's adapter: that of the first pattern which fits its name, else r."""
        return self._of(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """lora_alpha of a layer's adapter, likewise."""
        return self._of(self.alpha_pattern, name, self.lora_alpha)

    def scaling_of(self, name: str) -> float:
        """The factor s of a layer's adapter: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
        r = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(r) if self.use_rslora else r)

    @staticmethod
    def _of(patterns: Mapping[str, T], name: str, otherwise: T) -> T:
        return next((value for pattern, value in patterns.items() if fits(name, pattern)), otherwise)

    @property
    def start(self) -> str:
        """Kind of start: init_lora_weights without its number of iterations."""
        return self.init_lora_weights.partition("_niter_")[0]

    @property
    def starts_from_weight(self) -> bool:
        """Whether an adapter starts from its layer's float weight."""
        return self.start not in ("default", "gaussian")

    @property
    def pissa_iterations(self) -> int | None:
        """Power iterations of PiSSA's SVD; None: an exact SVD."""
        number = self.init_lora_weights.partition("_niter_")[2]
        return int(number) if number else None

    def with_start(self, init_lora_weights: str, loftq_config: dict[str, int] | None = None) -> "QLoRAConfig":
        """The same choices with another start of the adapters, and none of the arguments of the one before."""
        return replace(
            self, init_lora_weights=init_lora_weights, loftq_config=loftq_config or {}, calibration_batches=None
        )

    @property
    def loftq_iterations(self) -> int:
        """How often LoftQ, or PiSSA, quantizes the weight less the adapter."""
        return self.loftq_config.get("loftq_iter", 1)


def fits(name: str, pattern: str) -> bool:
    """Whether a layer's name fits a key of a pattern, as in PEFT: its possible ending, a regular expression allowed.

    The name counts with and without its first part, since the model stands under an attribute of the LightningModule.
    """
    return any(re.match(rf"(.*\.)?({pattern})$", form) for form in (name, name.partition(".")[2]))


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if isinstance(value, bool) or not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}.")


def _check_start(start: Any, loftq_config: Any, calibration_batches: Any) -> None:
    if not (isinstance(start, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", start)):
        allowed = get_args(get_args(InitLoRAWeights)[0])
        if start not in allowed:
            names = ", ".join(map(repr, allowed))
            raise ValueError(f"init_lora_weights={start!r}: must be one of {names}, or 'pissa_niter_16' (any number).")
    for key, value in _patterns("loftq_config", loftq_config):
        if _integer(f"loftq_config[{key!r}]", value) < 1 or key not in ("loftq_iter", "loftq_bits"):
            raise ValueError(f"loftq_config={loftq_config!r}: takes 'loftq_iter', a whole number of 1 or more.")
        if key == "loftq_bits" and value != 4:
            raise ValueError(f"loftq_config={loftq_config!r}: loftq_bits can only be 4 here.")
    if calibration_batches is not None and _integer("calibration_batches", calibration_batches) < 1:
        raise ValueError(f"calibration_batches={calibration_batches!r}: must be 1 or more, or None.")
    if calibration_batches is not None and start != "calibrated":
        raise ValueError(
            f"calibration_batches={calibration_batches!r}: only init_lora_weights='calibrated' looks at batches, and "
            f"it is {start!r}. Leave it out, or set init_lora_weights='calibrated'."
        )
    if loftq_config and not start.startswith(("loftq", "pissa")):
        raise ValueError(
            f"loftq_config={loftq_config!r}: only init_lora_weights='loftq' and 'pissa' iterate, and it is {start!r}. "
            "Leave it out, or set init_lora_weights."
        )


def _patterns(name: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(key, str) and key for key in value):
        raise TypeError(f"{name}={value!r}: must be a dict whose keys are non-empty strings.")
    if name != "loftq_config":
        for key in value:
            check_regex(name, key)
    return list(value.items())


def _check_alpha(name: str, value: Any) -> None:
    if not (math.isfinite(_number(name, value)) and value > 0):
        raise ValueError(f"{name}={value!r}: must be a finite number above 0.")


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
