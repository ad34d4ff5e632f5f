"""An optimizer that was created before conversion, as in LightningCLI and Fabric loops, gets the adapters."""

from torch import nn
from torch.optim import Optimizer

from lightning_qlora.layers.experts import QLoRAExperts
from lightning_qlora.layers.lora_layer import ADAPTER
from lightning_qlora.layers.names import join, last_part, owner_name
from lightning_qlora.layers.qlora_linear import REPLACED
from lightning_qlora.layers.trainable_tokens import DELTA, ROWS


def replace_parameters_by_adapters(optimizer: Optimizer) -> None:
    """Put the adapters in place of the weights that conversion replaced, in the same parameter groups.

    The optimizer and its groups stay the same objects, because schedulers refer to them. An optimizer that has state is
    not changed; `guards.check_optimizer` refuses it.
    """
    if optimizer.state or not any(hasattr(p, REPLACED) for group in optimizer.param_groups for p in group["params"]):
        return
    for group in optimizer.param_groups:
        params = [_replacements(param) for param in group["params"]]
        if "param_names" in group:  # the optimizer was created from named_parameters()
            named = zip(group["param_names"], params, strict=True)
            group["param_names"] = [
                join(owner_name(name), key) if key else name for name, of_name in named for key in of_name
            ]
        group["params"][:] = [param for of_param in params for param in of_param.values()]


def leave_out_bytes(optimizer: Optimizer) -> None:
    """Remove the bytes of 4-bit weights, which are frozen parameters where a strategy splits them over ranks.

    So an optimizer of `self.parameters()` has the same parameters, and its checkpoints the same numbers, everywhere.
    """
    for group in optimizer.param_groups:
        kept = [index for index, param in enumerate(group["params"]) if param.is_floating_point()]
        for key in group.keys() & {"params", "param_names"} if len(kept) < len(group["params"]) else ():
            group[key][:] = [group[key][index] for index in kept]


def _replacements(param: nn.Parameter) -> dict[str, nn.Parameter]:
    """The adapter of a weight that conversion replaced, by name endings; {"": param} for another parameter."""
    if hasattr(param, ROWS):
        return {DELTA: getattr(param, ROWS)}
    layer: nn.Module | None = getattr(param, REPLACED, None)
    if layer is None:
        return {"": param}
    prefix = ""
    if isinstance(layer, QLoRAExperts):
        prefix = layer.layers[0].full_name.split(".")[-2]
    adapter = {
        join(prefix, name): parameter
        for name, parameter in layer.named_parameters()
        if last_part(name) in (*ADAPTER, last_part(DELTA))
    }
    return adapter or {"": param}  # no adapter: the layer was merged
