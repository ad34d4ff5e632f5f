"""The optimizers of a run hold the adapters, also if they were created before conversion (LightningCLI, Fabric)."""

from collections.abc import Collection, Mapping
from itertools import chain, repeat
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_qlora.checks import TRAIN_IN_FULL
from lightning_qlora.layers.names import join, owner_name
from lightning_qlora.layers.qlora_linear import MERGED_ADAPTER, REPLACED, ROWS, adapted_layers
from lightning_qlora.layers.with_adapter import WithAdapter
from lightning_qlora.survey.parts import Parts


def replace_parameters_by_adapters(optimizer: Optimizer) -> None:
    """Put the adapters in place of the weights that conversion replaced, in the same parameter groups.

    The optimizer and its groups stay the same objects, because schedulers refer to them. An optimizer that has state is
    not changed; `check_optimizer` refuses it.
    """
    if optimizer.state or not any(hasattr(parameter, REPLACED) for parameter in optimizer_parameters(optimizer)):
        return
    for group in optimizer.param_groups:
        names = group.get("param_names")  # of an optimizer that was created from named_parameters()
        pairs = [
            (adapter, join(owner_name(name), ending) if ending else name)
            for parameter, name in zip(group["params"], names or repeat(""), strict=False)
            for ending, adapter in _replacements(parameter).items()
        ]
        group["params"][:] = [adapter for adapter, _ in pairs]
        if names is not None:
            group["param_names"] = [name for _, name in pairs]


def replace_merged_adapters(optimizer: Optimizer) -> None:
    """Put the adapters of a later conversion in place of merged ones (ReLoRA), without the state of those."""
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            owner, key = getattr(parameter, MERGED_ADAPTER, (None, ""))
            new = None if owner is None else dict(owner.named_parameters()).get(key)
            if new is None or new is parameter:
                continue
            group["params"][index] = new
            optimizer.state.pop(parameter, None)


def leave_out_bytes(optimizer: Optimizer) -> None:
    """Remove the bytes of 4-bit weights, which are frozen parameters where a strategy splits them over ranks.

    So an optimizer of `self.parameters()` has the same parameters, and its checkpoints the same numbers, everywhere.
    """
    for group in optimizer.param_groups:
        kept = [index for index, param in enumerate(group["params"]) if param.is_floating_point()]
        for key in group.keys() & {"params", "param_names"}:
            group[key][:] = [group[key][index] for index in kept]


def optimizer_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _replacements(param: Any) -> dict[str, Any]:
    """The adapter of a weight that conversion replaced, by name endings; {"": param} for another parameter."""
    part: nn.Module | None = getattr(param, ROWS, getattr(param, REPLACED, None))
    adapter: dict[str, nn.Parameter] = {}
    for each in part.modules() if part is not None else ():
        if isinstance(each, WithAdapter):
            adapter |= each.trains_instead()
    return adapter or {"": param}  # no adapter: the layer was merged


def trainable_inputs(inputs: Any) -> list[Any]:
    """Those of the `inputs` of a backward pass that need a gradient; for a weight that was replaced, its adapter."""
    given = [inputs] if isinstance(inputs, Tensor) else inputs
    values = chain.from_iterable(_replacements(value).values() for value in given)
    return [value for value in values if getattr(value, "requires_grad", True)]  # torch's GradientEdge has no such name


def check_optimizer(optimizer: Optimizer) -> None:
    parameters = optimizer_parameters(optimizer)
    replaced = [getattr(parameter, REPLACED) for parameter in parameters if hasattr(parameter, REPLACED)]
    if replaced:
        name = next((layer.full_name for part in replaced for layer in adapted_layers(part).values()), "merged since")
        raise RuntimeError(
            f"The {type(optimizer).__name__} was created before the module was converted and has state: it holds the "
            f"replaced weights of {len(replaced)} layers ({name}, ...) and not their adapters, so nothing would train. "
            "Create it in configure_optimizers, or after fabric.setup_module; one with no state, which has made no "
            "step, gets the adapters when fabric.setup or the Trainer sets it up."
        )
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        raise RuntimeError(
            f"All {len(parameters)} parameters of the {type(optimizer).__name__} are frozen, so nothing would train. "
            f"Conversion freezes all but the adapters: {TRAIN_IN_FULL}. Or the module was frozen after conversion "
            "(freeze(), requires_grad_(False), PEFT's prepare_model_for_kbit_training): leave that out."
        )


def adapters_in_no_optimizer(module: nn.Module, optimizers: list[Optimizer]) -> list[str]:
    """Names of layers whose adapters get gradients, and do not train; [] if there is no optimizer.

    Without copies of layers that train, which follow them by an average.
    """
    ids = {id(parameter) for optimizer in optimizers for parameter in optimizer_parameters(optimizer)}
    adapters = Parts(module.named_modules(), ()).adapters if optimizers else {}
    free = [
        name
        for name, adapter in adapters.items()
        if any(p.requires_grad and id(p) not in ids for p in adapter.adapter_parameters())
    ]
    if not free:
        return []
    copies = layers_with_base_of(adapters.keys() - {*free}, adapters)
    return [name for name in free if name not in copies]


def layers_with_base_of(names: Collection[str], layers: Mapping[str, Any]) -> set[str]:
    """Names of layers whose 4-bit weights are those of a layer with one of these names; of sharded ones none."""
    whole = {name: layer for name, layer in layers.items() if "packed" in vars(layer)}
    bases = {whole[name].base_fingerprint() for name in names if name in whole}
    return {name for name, layer in whole.items() if layer.base_fingerprint() in bases}


def check_loss(loss: Any) -> None:
    if isinstance(loss, Tensor) and not loss.requires_grad:
        raise RuntimeError(
            "The loss needs no gradient, so no adapter can train. Either it was computed without a converted layer, "
            "under torch.no_grad() or inside disable_adapter, or all parameters were frozen after conversion "
            "(freeze()), or the model runs its layers inside an autograd.Function (Reformer, reentrant checkpointing), "
            "which records nothing if its inputs need no gradient, and the embeddings are frozen: call "
            "model.enable_input_require_grads() of the transformers model, and model.train() if it asks for it."
        )
