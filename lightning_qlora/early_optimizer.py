"""An optimizer made before conversion, as LightningCLI makes that of its `optimizer` section: it gets the adapters."""

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from lightning_qlora.adapted_linear import ADAPTER
from lightning_qlora.linear import REPLACED, QLoRALinear


def give_adapters(optimizer: Optimizer, layers: Mapping[str, QLoRALinear]) -> None:
    """Put a layer's adapter in the place of its replaced weight, in the same group, with the group's own numbers.

    The optimizer and its groups stay the same objects, for the schedulers made from them. One that has state, or holds
    weights of other layers, is left as it is; `guards.check_optimizer` refuses it.

    Args:
        optimizer: Any torch optimizer.
        layers: Name -> converted layer.
    """
    replaced = {
        getattr(p, REPLACED) for group in optimizer.param_groups for p in group["params"] if hasattr(p, REPLACED)
    }
    if optimizer.state or not replaced <= layers.keys():
        return
    for group in optimizer.param_groups:
        params = [_in_place_of(param, layers) for param in group["params"]]
        if "param_names" in group:  # of an optimizer made from named_parameters()
            named = zip(group["param_names"], params, strict=True)
            group["param_names"] = [_renamed(name, key) for name, of_name in named for key in of_name]
        group["params"][:] = [param for in_place in params for param in in_place.values()]


def _in_place_of(param: nn.Parameter, layers: Mapping[str, QLoRALinear]) -> dict[str, nn.Parameter]:
    """Key in the layer -> parameter of the adapter; under "" the parameter itself if it wasn't replaced."""
    if not hasattr(param, REPLACED):
        return {"": param}
    held = layers[getattr(param, REPLACED)]._parameters
    return {key: own for key in ADAPTER if (own := held.get(key)) is not None}


def _renamed(name: str, key: str) -> str:
    return f"{name.rpartition('.')[0]}.{key}".lstrip(".") if key else name
