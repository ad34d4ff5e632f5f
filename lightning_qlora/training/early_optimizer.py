"""An optimizer that was made before conversion, as LightningCLI makes it, gets the adapters of the converted layers."""

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from lightning_qlora.layers.experts import is_expert
from lightning_qlora.layers.lora import ADAPTER
from lightning_qlora.layers.qlora_linear import REPLACED, QLoRALinear


def replace_parameters_by_adapters(optimizer: Optimizer, layers: Mapping[str, QLoRALinear]) -> None:
    """Replace each weight that conversion replaced by its adapter (or its experts'), in the same parameter group.

    The optimizer and its groups stay the same objects, because schedulers refer to them. An optimizer that has state,
    or holds weights of other layers, is not changed; `guards.check_optimizer` refuses it.

    Args:
        optimizer: Any torch optimizer.
        layers: Name -> converted layer.
    """
    replaced = {
        getattr(p, REPLACED) for group in optimizer.param_groups for p in group["params"] if hasattr(p, REPLACED)
    }
    stacks = {name.rpartition(".")[0] for name in layers if is_expert(name)}
    if optimizer.state or not replaced <= layers.keys() | stacks:
        return
    for group in optimizer.param_groups:
        params = [_replacements(param, layers) for param in group["params"]]
        if "param_names" in group:  # the optimizer was made from named_parameters()
            named = zip(group["param_names"], params, strict=True)
            group["param_names"] = [_renamed(name, key) for name, of_name in named for key in of_name]
        group["params"][:] = [param for of_param in params for param in of_param.values()]


def _replacements(param: nn.Parameter, layers: Mapping[str, QLoRALinear]) -> dict[str, nn.Parameter]:
    """Key in the layer -> parameter of the adapter; {"": param} if conversion did not replace it."""
    if not hasattr(param, REPLACED):
        return {"": param}
    name = getattr(param, REPLACED)
    if name in layers:
        return _adapter_of(layers[name])
    experts = {full: layer for full, layer in layers.items() if full.rpartition(".")[0] == name}
    inner = name.rpartition(".")[0]
    return {
        f"{full.removeprefix(inner + '.')}.{key}": parameter
        for full, layer in experts.items()
        for key, parameter in _adapter_of(layer).items()
    }


def _adapter_of(layer: QLoRALinear) -> dict[str, nn.Parameter]:
    return {key: parameter for key in ADAPTER if (parameter := layer._parameters.get(key)) is not None}


def _renamed(name: str, key: str) -> str:
    return f"{name.rpartition('.')[0]}.{key}".lstrip(".") if key else name
