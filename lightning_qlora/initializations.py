"""What each initialization of adapters means for other files; `layers/initialization.py` computes them."""

import re
from typing import Any, Literal, NamedTuple

from lightning_qlora.checks import check_choice, check_dict, check_integer

InitLoRAWeights = Literal["default", "gaussian", "loftq", "pissa", "calibrated"] | str  # or "pissa_niter_16"


class InitKind(NamedTuple):
    keeps_initial: bool = False  # A and B are computed from the float weight, and checkpoints hold what they began with
    moves_weight: bool = False  # a large part of the weight is in the adapter: the base is not the pretrained model
    changes_base: int | None = None  # from this number of iterations on, the base is not quantize(W)
    needs_data: bool = False  # A and B are computed in the first step
    exact: bool = True  # all values have the same bits on every machine; those of an SVD do not
    iterates: bool = False  # takes loftq_config


INITIALIZATIONS = {
    "default": InitKind(),
    "gaussian": InitKind(),
    "loftq": InitKind(keeps_initial=True, changes_base=2, exact=False, iterates=True),
    "pissa": InitKind(keeps_initial=True, moves_weight=True, changes_base=1, exact=False, iterates=True),
    "calibrated": InitKind(keeps_initial=True, needs_data=True, exact=False),
}


def split_name(init_lora_weights: str) -> tuple[str, int | None]:
    """The row of INITIALIZATIONS, and the power iterations of PiSSA's SVD; None: an exact SVD."""
    name, _, iterations = init_lora_weights.partition("_niter_")
    return name, int(iterations) if iterations else None


def check_initialization(init_lora_weights: Any, loftq_config: Any) -> None:
    if not (isinstance(init_lora_weights, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", init_lora_weights)):
        check_choice("init_lora_weights", init_lora_weights, (*INITIALIZATIONS, "pissa_niter_16"))
    check_dict("loftq_config", loftq_config)
    for key, value in loftq_config.items():
        check_choice("key of loftq_config", key, ("loftq_iter", "loftq_bits"))
        check_integer(f"loftq_config[{key!r}]", value, at_least=1)
        if key == "loftq_bits":
            check_choice("loftq_config['loftq_bits']", value, (4,))
    if loftq_config and not INITIALIZATIONS[split_name(init_lora_weights)[0]].iterates:
        names = " and ".join(repr(name) for name, kind in INITIALIZATIONS.items() if kind.iterates)
        raise ValueError(
            f"loftq_config={loftq_config!r}: is used only by init_lora_weights={names}, not by {init_lora_weights!r}. "
            "Leave it out, or set init_lora_weights."
        )
