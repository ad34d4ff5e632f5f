"""QLoRAConfig: every argument of a QLoRA run, described once and checked when the object is created."""

import math
import os
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from functools import partial, wraps
from typing import Any, Literal, NamedTuple, get_args

from lightning_qlora.checks import (
    check_auto,
    check_bool,
    check_choice,
    check_gradient_checkpointing,
    check_initialization,
    check_integer,
    check_names,
    check_number,
    check_patterns,
    check_string,
    check_token_indices,
    refuse_unknown_arguments,
    shown,
)

QuantType = Literal["nf4", "fp4", "int4"]
ComputeDtype = Literal["auto", "bf16", "fp16", "fp32"]
# The rows of `starts.starts.STARTS`.
InitLoRAWeights = Literal["default", "gaussian", "calibrated"]
Base = Literal["quantized", "float"]  # the base model that adapters are put on: in 4 bits, or in 16 or 32 bits
Checkpoint = Literal["adapter", "full"]
MergeDtype = Literal["auto", "bf16", "fp16", "fp32"]  # of the weights that a merge writes
OptimizerName = Literal["adamw", "adamw8bit", "sgd", "momentum"]  # whose state `estimate_memory` counts
DeviceName = Literal["gpu", "cpu"]
StrategyName = Literal["ddp", "fsdp"]

TokenIndices = list[int] | dict[str, list[int]]
TORCH_DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}
ALL_LINEAR = "all-linear"  # of target_modules, alone or in a list; no regular expression contains it
MOST_ALPHA = 1e30  # kernels multiply by lora_alpha / r in fp32
QUANT_TYPES: tuple[QuantType, ...] = get_args(QuantType)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def _check_number(name: str, value: Any, **limits: float) -> None:
    check_number(name, value, **limits)
    if not isinstance(value, int | float):  # JSON, in which checkpoints have it, has no other numbers
        raise TypeError(f"{name}={shown(value)}: must be an int or a float. Pass it as float(...).")


_check_rank = partial(check_integer, at_least=1)
_check_alpha = partial(_check_number, above=0, below=MOST_ALPHA)
_check_expression = partial(check_names, or_regex=True)


def _check_block_size(name: str, value: Any) -> None:
    check_integer(name, value)
    check_choice(name, value, BLOCK_SIZES)


class Argument(NamedTuple):
    """What an argument means beside its value: metadata of its field."""

    check: Callable[[str, Any], None]  # what its value must be, if it is not the default
    default: Any
    empty: type[Any] | None = None  # type of the empty value that None stands for
    of_layer: bool = False  # layers of a module may differ in it
    at_loading: bool = False  # a layer that is quantized while its model loads uses it then
    of_base: bool = False  # it decides the bytes of the 4-bit weights; adapter folders have it in `quantization`
    of_function: bool = False  # it changes what an adapter computes
    in_peft: bool = False  # adapter_config.json has it, with the same values
    needs_values: bool = False  # a model that gets its values after it was sharded can't have it


def _argument(default: Any, check: Callable[[str, Any], None], **meaning: Any) -> Any:
    return field(default=default, metadata={"argument": Argument(check, default, **meaning)})


def _refuses_unknown_arguments(cls: type["QLoRAConfig"]) -> type["QLoRAConfig"]:
    """Class decorator: positional and unknown arguments raise an error that names our argument."""
    init: Callable[..., None] = cls.__init__

    @wraps(init)
    def checked(self: "QLoRAConfig", /, *args: Any, **kwargs: Any) -> None:
        if args:
            raise TypeError(
                f"{shown(args[0])}: arguments are passed by name, such as r=16. The values of a LoraConfig have the "
                "same names here: r=config.r, lora_alpha=config.lora_alpha, target_modules=..."
            )
        if not kwargs.keys() <= cls.__dataclass_fields__.keys():
            refuse_unknown_arguments(kwargs, cls.__dataclass_fields__)
        init(self, **kwargs)

    cls.__init__ = checked  # type: ignore[assignment, method-assign]
    return cls


@_refuses_unknown_arguments
@dataclass(frozen=True, repr=False, kw_only=True)
class QLoRAConfig:
    """The arguments of `QLoRAPrecision` and `convert`. The defaults are the settings of the QLoRA paper.

    Args:
        quant_type: 4-bit data type of the frozen weights.
        double_quant: Quantize the block scales to 8 bits as well. This saves 0.37 bits per weight (QLoRA paper,
            section 3).
        block_size: Number of weights that share one scale: a power of two from 32 to 4096.
        compute_dtype: Data type to which the 4-bit weights are decoded for each matmul. "auto": bf16 on a GPU,
            and fp16 on one without bf16; on a CPU the data type of the original weight. In fp16 the matmuls have a
            power of two and fp32 results, so nothing overflows. In Python also a torch.dtype.
        r: Rank of the adapters.
        lora_alpha: The output of an adapter is multiplied by lora_alpha / r.
        lora_dropout: Dropout probability of the adapters' inputs during training.
        target_modules: Layers to convert, as in PEFT: "all-linear", a regular expression that matches the full name,
            or a list of name endings. ["all-linear", "lm_head"] is all of "all-linear" and the output embedding.
        exclude_modules: Layers not to convert, which stay dense and frozen: a regular expression or a list of name
            endings. The name of a module stands for all layers inside it.
        modules_to_save: Modules to train in full, in fp32, and to save with the adapters: a list of name endings.
        trainable_token_indices: Tokens whose rows of the input embedding train, as in PEFT: a list of indices, or a
            dict of such lists, {name ending of an embedding or output embedding: list}. All other rows are frozen.
        init_lora_weights: Initialization of the adapters: "default" (as in PEFT, B = 0), "gaussian" (B = 0), or
            "calibrated" (computed from the batches of the first step).
        use_rslora: Multiply the output of an adapter by lora_alpha / sqrt(r) instead (rank-stabilized LoRA).
        use_dora: Also train the magnitude of every output row (weight-decomposed LoRA).
        rank_pattern: Rank of single layers, as in PEFT: {name ending or regular expression: r}.
        alpha_pattern: lora_alpha of single layers, as in PEFT: {name ending or regular expression: lora_alpha}.
        paged_optimizer: Page optimizer state to host memory: True, False, or "auto" (True for CUDA devices).
        gradient_checkpointing: Recompute activations in the backward pass to save memory. "auto": only those that do
            not fit; a number of bytes, also as "8GiB": that the process may use on its device. "offload": for the
            longest sequences.
        checkpoint: Content of a checkpoint: "adapter" (the adapters and all other trained weights), or "full" (the
            4-bit base as well).
        adapter: Folder of a PEFT adapter to start from.
        deferred_logits: Compute the cross entropy of the output embedding in pieces, so that a training step never
            holds the logits of all tokens; other code that reads the logits gets them. True, False, or "auto" (True
            for output embeddings with at least four times as many outputs as inputs).

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.

    Example:
        ```python
        from lightning_qlora import QLoRAConfig

        config = QLoRAConfig(r=16, lora_alpha=32)
        print(config.scaling)  # 2.0
        ```
    """

    quant_type: QuantType = _argument(
        "nf4", partial(check_choice, allowed=QUANT_TYPES), of_layer=True, at_loading=True, of_base=True
    )
    double_quant: bool = _argument(True, check_bool, of_layer=True, at_loading=True, of_base=True)
    block_size: int = _argument(64, _check_block_size, of_layer=True, at_loading=True, of_base=True)
    compute_dtype: ComputeDtype = _argument(
        "auto", partial(check_choice, allowed=get_args(ComputeDtype)), of_layer=True
    )
    r: int = _argument(64, _check_rank, of_layer=True, at_loading=True, in_peft=True)
    lora_alpha: float = _argument(16, _check_alpha, of_layer=True, at_loading=True, of_function=True, in_peft=True)
    lora_dropout: float = _argument(0.05, partial(_check_number, at_least=0, below=1), of_layer=True, in_peft=True)
    target_modules: str | list[str] = _argument("all-linear", _check_expression)
    exclude_modules: str | list[str] | None = _argument(None, _check_expression, empty=list)
    modules_to_save: list[str] | None = _argument(None, check_names, empty=list, in_peft=True)
    trainable_token_indices: TokenIndices | None = _argument(None, check_token_indices, in_peft=True, needs_values=True)
    init_lora_weights: InitLoRAWeights = _argument(
        "default", partial(check_initialization, allowed=get_args(InitLoRAWeights)), at_loading=True
    )
    use_rslora: bool = _argument(False, check_bool, of_layer=True, at_loading=True, of_function=True, in_peft=True)
    use_dora: bool = _argument(False, check_bool, of_layer=True, at_loading=True, of_function=True, in_peft=True)
    rank_pattern: dict[str, int] | None = _argument(
        None, partial(check_patterns, check=_check_rank), empty=dict, in_peft=True
    )
    alpha_pattern: dict[str, float] | None = _argument(
        None, partial(check_patterns, check=_check_alpha), empty=dict, in_peft=True
    )
    paged_optimizer: bool | Literal["auto"] = _argument("auto", check_auto)
    gradient_checkpointing: bool | int | str = _argument(False, check_gradient_checkpointing)
    checkpoint: Checkpoint = _argument("adapter", partial(check_choice, allowed=get_args(Checkpoint)))
    adapter: str | None = _argument(None, check_string)
    deferred_logits: bool | Literal["auto"] = _argument("auto", check_auto)

    def __post_init__(self) -> None:
        if not isinstance(self.compute_dtype, str):  # a torch.dtype; YAML and checkpoints have our word
            object.__setattr__(self, "compute_dtype", TORCH_DTYPES.get(str(self.compute_dtype), self.compute_dtype))
        for name, argument in ARGUMENTS.items():
            value = getattr(self, name)
            if value is None and argument.empty is not None:
                object.__setattr__(self, name, argument.empty())
            elif value is not argument.default:
                argument.check(name, value)
        if self.target_modules in ("", []):
            raise ValueError(
                f"target_modules={self.target_modules!r} selects no layer: use 'all-linear', a regular expression, "
                "or a list of name endings such as ['q_proj', 'v_proj']."
            )
        is_regex = isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR
        if is_regex and ALL_LINEAR in self.target_modules:
            raise ValueError(
                f"target_modules={self.target_modules!r}: a regular expression can't contain 'all-linear'. For all "
                "linear layers and others use a list, such as ['all-linear', 'lm_head']."
            )
        if self.adapter is not None:
            files = ("adapter_config.json", "adapter_model.safetensors")  # one may be missing after an interrupted save
            if not any(os.path.isfile(os.path.join(self.adapter, file)) for file in files):
                raise ValueError(
                    f"adapter={self.adapter!r}: must be a folder on this machine with PEFT's {' and '.join(files)} "
                    f"(seen from {os.getcwd()}). An adapter of the Hugging Face Hub is downloaded before."
                )

    def __repr__(self) -> str:
        """The arguments that are not the defaults."""
        defaults = vars(QLoRAConfig())
        arguments = [f"{name}={value!r}" for name, value in vars(self).items() if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(arguments)})"

    @property
    def named_targets(self) -> str | list[str]:
        """target_modules without "all-linear"; an empty list if nothing else is named."""
        if self.target_modules == ALL_LINEAR:
            return []
        if isinstance(self.target_modules, str):
            return self.target_modules
        return [pattern for pattern in self.target_modules if pattern != ALL_LINEAR]

    @property
    def scaling(self) -> float:
        """Factor of the output of an adapter: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
        if self.use_rslora:
            return self.lora_alpha / math.sqrt(self.r)
        return self.lora_alpha / self.r

    def with_own(self, arguments: Mapping[str, Any]) -> "QLoRAConfig":
        """The config of one layer, with these arguments and without patterns."""
        if not arguments:
            return self
        return self.changed(rank_pattern={}, alpha_pattern={}, **arguments)

    def changed(self, **arguments: Any) -> "QLoRAConfig":
        """The same config with other values of arguments whose checks ask for no other argument."""
        own = {name: getattr(self, name) for name in arguments}
        if own == arguments and [*map(type, own.values())] == [*map(type, arguments.values())]:  # 1 == True == 1.0
            return self
        config = copy(self)
        for name, value in arguments.items():
            CHECKS[name](name, value)
            object.__setattr__(config, name, value)
        return config


ARGUMENTS: dict[str, Argument] = {each.name: each.metadata["argument"] for each in fields(QLoRAConfig)}


CHECKS = {name: argument.check for name, argument in ARGUMENTS.items()}


def arguments_that(meaning: str) -> tuple[str, ...]:
    return tuple(name for name, argument in ARGUMENTS.items() if getattr(argument, meaning))
