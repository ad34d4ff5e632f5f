"""The arguments of `QLoRAConfig` for functions that take them as `**arguments`: for type checkers, and for help()."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar

import torch

from lightning_qlora.config import Checkpoint, ComputeDtype, InitLoRAWeights, QLoRAConfig, QuantType

Init = TypeVar("Init", bound=Callable[..., None])


class QLoRAArguments(TypedDict, total=False):
    """The fields of `QLoRAConfig`, for `**arguments: Unpack[QLoRAArguments]`, which takes no dataclass."""

    quant_type: QuantType
    double_quant: bool
    block_size: int
    compute_dtype: ComputeDtype | torch.dtype
    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None
    modules_to_save: list[str] | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    init_lora_weights: InitLoRAWeights
    use_rslora: bool
    use_dora: bool
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None
    paged_optimizer: bool | Literal["auto"]
    gradient_checkpointing: bool | int | str
    checkpoint: Checkpoint
    adapter: str | None
    deferred_logits: bool | Literal["auto"]


def shows_arguments(init: Init) -> Init:
    """Give an `__init__(self, **arguments)` the signature and docstring of QLoRAConfig, for help() and LightningCLI."""
    shown: Any = init
    signature = inspect.signature(QLoRAConfig)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    shown.__signature__ = signature.replace(parameters=[itself, *signature.parameters.values()])
    shown.__doc__ = QLoRAConfig.__doc__
    return init
