"""Numbers of parameters and bytes of a module; parameters that are shared count once."""

from collections.abc import Iterable

from torch import Tensor, nn

from lightning_qlora.layers.matrix import ADAPTER
from lightning_qlora.layers.packed_layer import BASE, PackedLayer
from lightning_qlora.tensors.fingerprint import is_strided


def count_parameters(modules: Iterable[nn.Module]) -> tuple[int, int, int]:
    """Parameters that train, all parameters, and their bytes; a 4-bit weight counts as its weights."""
    layers, others = _weights(modules, BASE)
    trainable = sum(parameter.numel() for parameter in others if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in others) + sum(layer.weight_bytes.numel for layer in layers)
    return trainable, total, packed_bytes(layers) + sum(map(_nbytes, others))


def packed_layers(module: nn.Module) -> list[PackedLayer]:
    return [layer for layer in module.modules() if isinstance(layer, PackedLayer)]


def packed_bytes(layers: Iterable[PackedLayer]) -> int:
    return sum(tensor.nbytes for layer in layers for tensor in layer.weight_bytes[:3])


def parameter_bytes(module: nn.Module) -> int:
    return count_parameters(module.modules())[2]


def dense_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the parameters without adapters and with every 4-bit weight in its original type."""
    layers, others = _weights(modules, (*BASE, *ADAPTER))
    dense = sum(layer.weight_bytes.numel * layer.weight_dtype.itemsize for layer in layers)
    return dense + sum(map(_nbytes, others))


def _weights(modules: Iterable[nn.Module], names: tuple[str, ...]) -> tuple[list[PackedLayer], list[nn.Parameter]]:
    """The layers in 4 bits, and all parameters, each once, without those of these layers that have these names."""
    modules = list(modules)
    layers = [layer for layer in modules if isinstance(layer, PackedLayer)]
    of_layers = {id(getattr(layer, name, None)) for layer in layers for name in names}
    parameters = {id(parameter): parameter for part in modules for parameter in part._parameters.values()}
    return layers, [p for key, p in parameters.items() if p is not None and key not in of_layers]


def _nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor; torch does not say them of sparse ones, which count as none."""
    return tensor.nbytes if is_strided(tensor) else 0
