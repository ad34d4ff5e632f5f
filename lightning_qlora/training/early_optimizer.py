"""An optimizer that was made before conversion, as LightningCLI and Fabric loops make it, gets the adapters."""

from torch import nn
from torch.optim import Optimizer

from lightning_qlora.layers.dotted_names import join, last_part, owner_name
from lightning_qlora.layers.experts import QLoRAExperts
from lightning_qlora.layers.lora_layer import ADAPTER
from lightning_qlora.layers.qlora_linear import REPLACED
from lightning_qlora.layers.trainable_tokens import DELTA, ROWS


def replace_parameters_by_adapters(optimizer: Optimizer) -> None:
    """Replace each weight that conversion replaced by its adapter (or its experts'), in the same parameter group.

    The optimizer and its groups stay the same objects, because schedulers refer to them. An optimizer that has state is
    not changed; `guards.check_optimizer` refuses it.
    """
    if optimizer.state or not any(hasattr(p, REPLACED) for group in optimizer.param_groups for p in group["params"]):
        return
    for group in optimizer.param_groups:
        params = [_replacements(param) for param in group["params"]]
        if "param_names" in group:  # the optimizer was made from named_parameters()
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
    """Ending of the name -> parameter of the adapter; {"": param} if conversion did not replace it."""
    if hasattr(param, ROWS):
        return {DELTA: getattr(param, ROWS)}
    became: nn.Module = getattr(param, REPLACED, nn.Module())
    prefix = became.layers[0].full_name.split(".")[-2] if isinstance(became, QLoRAExperts) else ""
    trains = (*ADAPTER, last_part(DELTA))
    of_adapter = [(join(prefix, name), p) for name, p in became.named_parameters() if last_part(name) in trains]
    return dict(of_adapter) or {"": param}
