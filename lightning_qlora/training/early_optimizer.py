"""An optimizer that was made before conversion, as LightningCLI and Fabric loops make it, gets the adapters."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_qlora.layers.dotted_names import join, owner_name
from lightning_qlora.layers.experts import QLoRAExperts
from lightning_qlora.layers.lora_layer import ADAPTER
from lightning_qlora.layers.packed_embedding import FrozenLayer
from lightning_qlora.layers.qlora_linear import REPLACED, QLoRALinear
from lightning_qlora.layers.trainable_tokens import DELTA, ROWS, TOKEN_ADAPTER


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
            group["param_names"] = [_renamed(name, key) for name, of_name in named for key in of_name]
        group["params"][:] = [param for of_param in params for param in of_param.values()]


def _replacements(param: nn.Parameter) -> dict[str, nn.Parameter]:
    """Ending of the name -> parameter of the adapter; {"": param} if conversion did not replace it."""
    became = getattr(param, REPLACED, None)
    if isinstance(became, FrozenLayer):
        rows: Any = became._modules.get(TOKEN_ADAPTER)
        return {} if rows is None else {DELTA: rows.trainable_tokens_delta}
    if isinstance(became, QLoRALinear):
        return _adapter_of(became)
    if isinstance(became, QLoRAExperts):
        experts = {".".join(layer.full_name.split(".")[-2:]): layer for layer in became.layers}
        return {f"{name}.{key}": p for name, layer in experts.items() for key, p in _adapter_of(layer).items()}
    return {DELTA: getattr(param, ROWS)} if hasattr(param, ROWS) else {"": param}


def _adapter_of(layer: QLoRALinear) -> dict[str, nn.Parameter]:
    return {key: parameter for key in ADAPTER if (parameter := layer._parameters.get(key)) is not None}


def _renamed(name: str, key: str) -> str:
    return join(owner_name(name), key) if key else name
