"""What a conversion refuses: parts without data, layers that were quantized in another way, and no layer at all."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_qlora.checks import KEEP_DENSE, TRAIN_IN_FULL, first_of
from lightning_qlora.config import QLoRAConfig, arguments_that
from lightning_qlora.layers.names import last_part, owner_name, tensors_of
from lightning_qlora.selection.selection import IN_MODULES_TO_SAVE, LARGE_RANK, Selection
from lightning_qlora.survey.survey import QUANTIZED_KINDS, Survey
from lightning_qlora.texts import ROOT

LOAD_IT = "Load it, as all others, before the module reaches the Trainer or fabric.setup."
LOAD_IN_CONFIGURE_MODEL = (
    "Call lightning_qlora.load_weights(module, FOLDER) after fully_shard. A copy of a model that was loaded in "
    "configure_model has no values: load it by from_pretrained too, or load both in __init__."
)
COMPUTE_IT = (
    "It is in no state dict: its module computes it when it is built. Build the model within "
    "accelerate.init_empty_weights() in place of torch.device('meta'), or a transformers model by "
    "from_pretrained(None, config=..., state_dict=...)."
)
SHOWN = 5  # layers with the reason that each was skipped


def check_has_data(modules: Iterable[tuple[str, nn.Module]], later: bool = False, advice: str = LOAD_IT) -> None:
    """Refuse a module that was built on the meta device if a part of it was never loaded, or can't be `later`."""
    owners = dict(modules)
    for name, tensor in tensors_of(list(owners.items())):
        if not tensor.is_meta:
            continue
        if last_part(name) in owners[owner_name(name)]._non_persistent_buffers_set:
            advice = COMPUTE_IT
        elif later:
            continue
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        raise ValueError(f"{name}: this {kind} is on the meta device, so it has no data. {advice}")


def refuse_nothing(choice: Selection, config: QLoRAConfig, is_one_of_several: bool) -> None:
    """Refuse a module of which nothing is converted; one of several may have layers that are too small for 4 bits."""
    message = f"No layer was converted to 4 bits ({no_layer(config)})."
    if not choice.train:
        reasons = "".join(f"\n  {name or ROOT}: {why}" for name, why in list(choice.skip.items())[:SHOWN])
        if len(choice.skip) > SHOWN:
            reasons += f"\n  and {len(choice.skip) - SHOWN} more"
        raise ValueError(message + (reasons or " The module has no linear layer (nn.Linear, Conv1D)."))
    small = [name or ROOT for name, reason in choice.train.items() if reason.startswith(LARGE_RANK)]
    has_new = any(reason.startswith("new: ") for reason in choice.train.values())
    if small and not has_new and not is_one_of_several:
        raise ValueError(
            f"{message} Adapters of this rank would not be smaller than the weights of the layers, so {len(small)} "
            f"would train in full: {first_of(small, 3)}. Set a smaller r, or {TRAIN_IN_FULL}."
        )


def no_layer(config: QLoRAConfig) -> str:
    return f"target_modules={config.target_modules!r}, r={config.r}"


def check_loaded(seen: Survey, choice: Selection) -> None:
    dense = choice.skip | choice.train
    for part in seen.parts:
        if part.kind not in QUANTIZED_KINDS:
            continue
        name = part.names.full
        row = choice.rows.get(name)
        if row is None or row.config is None:
            differing = [f"is to stay dense now: {dense.get(name, IN_MODULES_TO_SAVE)}"]
        else:
            layer: Any = part.owner if part.stack is None else part.stack.layer
            differing = differing_arguments(layer.config, row.config, arguments_that("at_loading"))
        if differing:
            raise ValueError(
                f"{name}: was quantized while its model loaded ({', '.join(differing)}). Load and convert with the "
                f"same arguments ({KEEP_DENSE} from the start; patterns must match the names in that model, without "
                "the attribute that holds it), or load the model outside of configure_model and plugin.init()."
            )


def differing_arguments(previous: QLoRAConfig, config: QLoRAConfig, names: Iterable[str]) -> list[str]:
    pairs = ((name, getattr(previous, name), getattr(config, name)) for name in names)
    return [f"{name}={was!r} and not {new!r}" for name, was, new in pairs if was != new]
