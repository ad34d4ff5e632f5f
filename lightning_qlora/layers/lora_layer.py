"""LoRALayer: a 4-bit weight with a LoRA adapter (Hu et al. 2021), and DoRA's magnitudes (`dora.py`).

    y = x W^T + s (drop(x) A^T) B^T

Dropout acts on the input of the adapter alone. With DoRA, PEFT computes g x W^T as x W^T + (g - 1) drop(x) W^T: equal
on average, with a second product with W.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor, nn

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels import ops
from lightning_qlora.kernels.lora_linear import lora_linear
from lightning_qlora.kernels.rounding import round_by_index
from lightning_qlora.layers.dtensor import gather, shard_like
from lightning_qlora.layers.initialization import methods
from lightning_qlora.layers.packed_linear import PackedLayer
from lightning_qlora.layers.trainable_tokens import TokenAdapter
from lightning_qlora.quantization.packed_weight import PackedBytes

ADAPTER = ("lora_A", "lora_B", "lora_magnitude_vector")  # the parameters that train
INITIAL = ("initial_A", "initial_B")  # their values at the start, if these were computed from the weight
TINY = torch.finfo(torch.float32).tiny
DISABLED = "_qlora_disabled"  # attribute: how many contexts of `disable_adapter` a layer is in
_lock = Lock()  # for the numbers of contexts


class LoRALayer(PackedLayer):
    """A 4-bit weight and the adapter that trains: A, B, and with DoRA the magnitudes of the rows."""

    lora_A: nn.Parameter  # [r, in], fp32; computed in the compute type
    lora_B: nn.Parameter  # [out, r], fp32
    lora_magnitude_vector: nn.Parameter | None  # [out], fp32, with DoRA
    scaling: float  # the factor s
    config: QLoRAConfig  # the arguments of the conversion, with this layer's r and lora_alpha and without patterns
    full_name: str  # in the converted module
    seed_name: str  # in the model that holds the layer; the seed of the adapter is made from it
    dense_weight: Tensor | None = None  # "calibrated": the float weight [out, in], in host memory until inputs come
    initial_A: Tensor | None = None  # what A and B began with, if it was computed from the weight; in host memory
    initial_B: Tensor | None = None
    _qlora_disabled: int = 0
    was_called: bool = False  # whether the op of the layer ran, and whether other code read the weight
    weight_was_read: bool = False
    weight_was_called: bool = False  # whether other code passed the weight to F.linear or matmul

    def initialize(self, weight: Tensor, device: torch.device | None = None) -> None:
        """Quantize a float weight and initialize the adapter; both are computed on `device`."""
        rows = self._as_stored(weight.detach())
        values = rows if rows.is_meta else rows.to(device or rows.device)  # on meta: `load_weights` reads them later
        base, lora_a, lora_b = methods.initialize(values, self.config, self.seed_name)
        self.set_packed_weight(base)
        if self.config.initialization == "calibrated":
            self.dense_weight = rows if rows.is_meta else rows.cpu()
        self.set_adapter(lora_a, lora_b)
        if self.config.initialization in ("loftq", "pissa"):
            self.set_initial(lora_a, lora_b)

    def set_adapter(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Set A and B; with DoRA the magnitudes become the norms of the rows, which leaves the output as it was."""
        self.write("lora_A", lora_a)
        self.write("lora_B", lora_b)
        if self.config.use_dora:
            self.write("lora_magnitude_vector", self.row_norm(gather(self.lora_A), gather(self.lora_B)))
        else:
            self.register_parameter("lora_magnitude_vector", None)

    def set_initial(self, lora_a: Tensor | None, lora_b: Tensor | None) -> None:
        """Keep copies of the A and B that training begins with: an adapter for the 16-bit base is the difference."""
        values = [v if v is None or v.is_meta else v.detach().to("cpu", copy=True) for v in (lora_a, lora_b)]
        self.initial_A, self.initial_B = values

    @property
    def initial(self) -> tuple[Tensor, Tensor] | None:
        """`initial_A` and `initial_B`; None if training began with B = 0, or from values of another module."""
        if self.initial_A is None or self.initial_B is None:
            return None
        return self.initial_A, self.initial_B

    def write(self, name: str, value: Tensor) -> None:
        """Set a parameter of the adapter, and create it if it does not exist."""
        parameter = self._parameters.get(name)
        if parameter is None:
            self.register_parameter(name, nn.Parameter(value.to(self.packed.device)))
        elif parameter.shape != value.shape:
            parameter.data = value.to(self.packed.device)  # another rank: an optimizer keeps the same parameter
        else:
            with torch.no_grad():
                parameter.copy_(shard_like(value, parameter))

    def quantize_weight(self, weight: Tensor) -> None:
        """Replace the base weight by a float weight of the shape of `weight`, quantized with this layer's config."""
        dense = self._as_stored(weight.detach()).to(self.packed.device)
        self.set_packed_weight(methods.quantize(dense, self.config))

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [p for name in ADAPTER if (p := self._parameters.get(name)) is not None]

    @property
    def r(self) -> int:
        """Rank of the adapter."""
        return self.lora_A.shape[0]

    def delta(self) -> Tensor:
        """What the adapter adds to W: s B A, with DoRA g (W + s B A) - W; fp32, in the shape of the dense weight."""
        added = self._product(gather(self.lora_A).detach(), gather(self.lora_B).detach())
        if self.lora_magnitude_vector is not None:
            base = ops.dequantize(self.whole_bytes, torch.float32)
            added = self.dora_scale().detach().unsqueeze(1) * (base + added) - base
        return self._as_stored(added)

    def _product(self, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return self.scaling * (lora_b.float() @ lora_a.float())

    def effective_weight(self) -> Tensor:
        """W + s B A, with DoRA g (W + s B A), [out, in], differentiable in the adapter.

        It is in the weight's type, rounded stochastically (`rounding`), each time in the same way.
        """
        base = ops.dequantize(self.whole_bytes, self.weight_dtype)
        if self._qlora_disabled:
            return base
        if not torch.compiler.is_compiling():
            self.__dict__["weight_was_read"] = True
        with torch.autocast(self.packed.device.type, enabled=False):
            total = base.float() + self._product(gather(self.lora_A), gather(self.lora_B))
        if self.lora_magnitude_vector is not None:
            total = self.dora_scale().unsqueeze(1) * total
        return round_by_index(total, self.weight_dtype)

    @torch.no_grad()
    def row_norm(self, lora_a: Tensor, lora_b: Tensor, weight: PackedBytes | None = None) -> Tensor:
        """||W + s B A|| of every row, [out], fp32, computed without that matrix; `weight`: some rows of W, None: all.

        Formula: its square is ||W||^2 + 2 s sum_r B * (W A^T + s/2 B A A^T), and the op of the layer applied to A is
        the bracket.
        """
        weight = self.whole_bytes if weight is None else weight
        a = lora_a.float()
        b = lora_b.float()
        s = self.scaling
        squares = self._base_squares
        if squares is None or squares.device != weight.packed.device or len(squares) != weight.shape[0]:
            squares = ops.dequantize(weight, torch.float32).square_().sum(1)  # in place: it is the whole weight
            self._base_squares = squares
        bracket = lora_linear(a, weight, None, a, b, s / 2)  # [r, out]
        return (squares + 2 * s * (b * bracket.T).sum(1)).clamp_min(0).sqrt()

    def dora_scale(self) -> Tensor:
        """DoRA's factor g = m / ||W + s B A||, [out], fp32; the norm has no gradient."""
        assert self.lora_magnitude_vector is not None
        norm = self.row_norm(gather(self.lora_A), gather(self.lora_B))
        return gather(self.lora_magnitude_vector) / norm.clamp_min(TINY)


def cancel_calibration(module: nn.Module) -> None:
    """Stop adapters that wait for data ("calibrated"): their values come from elsewhere now."""
    for part in module.modules():
        calibration = vars(part).get("_qlora_calibration")
        if calibration is not None:
            calibration.cancel()


@contextmanager
def disable_adapter(module: nn.Module) -> Iterator[None]:
    """Within this context a module computes as its 4-bit base does: y = x W^T + bias, also with dropout and DoRA.

    The reference model of DPO, or a comparison before and after training, without a second model. Parameters that train
    in full keep their trained values. `layer.weight` is W alone. The context belongs to the module: other threads that
    run it compute without adapters too. Run the backward pass where the forward pass ran, inside or outside: gradient
    checkpointing computes its blocks again.

    Args:
        module: A converted module, a part of one, or a wrapper of one (DDP, Fabric, torch.compile).

    Raises:
        ValueError: If no layer in it is converted, or an adapter began as PiSSA: its base is not the pretrained model.
    """
    parts = _parts(module)
    _count(parts, 1)
    try:
        yield
    finally:
        _count(parts, -1)


def _parts(module: nn.Module) -> list[nn.Module]:
    """The layers, and rows of tokens, that have an adapter; warns of what trains without one."""
    layers = [part for part in module.modules() if isinstance(part, LoRALayer)]
    if not layers:
        raise ValueError(
            f"disable_adapter: {type(module).__name__} has no converted layer, so there is no adapter to disable. "
            "Call convert(module) first, or let the Trainer do so."
        )
    pissa = next((layer for layer in layers if layer.config.initialization == "pissa"), None)
    if pissa is not None:
        raise ValueError(
            f"disable_adapter: {pissa.full_name} was initialized with PiSSA, which moves the largest part of the "
            "weight into the adapter, so the base without it is not the pretrained model. Use another "
            "init_lora_weights."
        )
    parts = [*layers, *(part for part in module.modules() if isinstance(part, TokenAdapter))]
    adapters = {id(p) for part in parts for p in part._parameters.values()}
    names = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in adapters]
    if names:
        warnings.warn(
            f"disable_adapter: {len(names)} parameters train in full and have their trained values in it: "
            f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}.",
            stacklevel=4,
        )
    return parts


def _count(parts: list[nn.Module], change: int) -> None:
    with _lock:
        for part in parts:
            contexts = vars(part).pop(DISABLED, 0) + change
            if contexts > 0:  # without it the attribute is absent, which torch.compile guards on
                vars(part)[DISABLED] = contexts
