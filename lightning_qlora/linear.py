"""QLoRALinear: what an nn.Linear becomes, a frozen 4-bit weight with a LoRA adapter beside it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora import linear_state, starts
from lightning_qlora.adapted_linear import AdaptedLinear
from lightning_qlora.bnb_layers import CAME_AS
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels import ops
from lightning_qlora.packed_linear import PackedLinear
from lightning_qlora.quantize.packed import PackedBytes, PackedWeight
from lightning_qlora.sharded import is_sharded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPLACED = "_qlora_layer"  # mark, with the layer's name, of a dense weight that conversion replaced


class QLoRALinear(AdaptedLinear):
    """y = x W^T + bias + s (drop(x) A^T) B^T with W frozen in 4 bits and A, B trained (QLoRA paper, equation 5).

    An `nn.Linear` becomes one in place (`from_linear`), so whatever refers to the layer still does. A layer of a class
    derived from it becomes one of both (`class_for`).

    Attributes:
        packed, absmax, nested: The 4-bit weight, frozen uint8 parameters; see `packed_weight`.
        bias: Frozen, [out], or None.
        lora_A, lora_B: The adapter, [r, in] and [out, r], fp32; see `AdaptedLinear` for the rest of it.
        lora_dropout: Probability of dropping an input of the adapter in training.
        loaded: How it was quantized while it was loaded (`loaded.Loaded`); None once conversion has settled the rest.
        dense_class: What the layer was, and is again when it is merged.
    """

    lora_dropout: float
    loaded: Any
    dense_class: type[nn.Module]

    @staticmethod
    def from_linear(layer: nn.Module, config: QLoRAConfig, name: str, device: torch.device | None = None) -> None:
        """Turn a dense layer into a QLoRALinear, in place.

        Args:
            layer: An nn.Linear, or a transformers Conv1D (whose weight is [in, out]).
            config: The choices.
            name: The layer's name, from which the seed of its adapter is made: the same on every rank.
            device: Where to quantize; None: where the weight is.
        """
        weight: Tensor = layer._parameters.pop("weight")  # type: ignore[assignment]
        setattr(weight, REPLACED, name)
        QLoRALinear._become(layer, type(layer), config, name).start(weight, device)
        layer.out_features, layer.in_features = layer._shape  # type: ignore[misc]

    @staticmethod
    def from_packed(
        layer: nn.Module, weight: PackedWeight, dense_class: type[nn.Module], config: QLoRAConfig, name: str
    ) -> None:
        """Turn a layer into a QLoRALinear, in place, that holds a weight which is in 4 bits already, byte for byte.

        Args:
            layer: Any linear layer, Conv1D or Linear4bit; a weight of its own is let go.
            weight: The 4-bit weight, [out, in].
            dense_class: nn.Linear or Conv1D: what the layer is when it is merged.
            config: The choices; the quantization is the weight's own.
            name: The layer's name.

        Raises:
            ValueError: If the adapter is to start from the float weight.
        """
        check_start_of_packed(config)
        layer._parameters.pop("weight", None)
        new = QLoRALinear._become(layer, dense_class, config, name)
        new.set_packed_weight(weight)
        new.out_features, new.in_features = new._shape
        new.set_adapter(*starts.random_adapter(new.in_features, new.out_features, config, name))

    @staticmethod
    def _become(layer: nn.Module, dense_class: type[nn.Module], config: QLoRAConfig, name: str) -> "QLoRALinear":
        layer.__dict__.update(
            dense_class=dense_class, config=config, full_name=name, dense_weight=None, input_rms=None, loaded=None,
            _fingerprint=None,
        )  # fmt: skip
        layer.__dict__.pop(CAME_AS, None)
        layer.__class__ = class_for(dense_class)
        assert isinstance(layer, QLoRALinear)
        layer.scaling, layer.lora_dropout = config.scaling_of(name), config.lora_dropout
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        return layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle a layer of a class made by `class_for`, which has no name that could be imported."""
        made = super().__reduce_ex__(protocol)
        if type(self) in (QLoRALinear, QLoRAConv1D) or type(self) is not class_for(self.dense_class):
            return made
        return _new, (self.dense_class,), *made[2:]

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The type this call computes in: autocast's, else the configured one, else the weight's (fp32 for fp64)."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        if self.config.compute_dtype != "auto":
            return DTYPES[self.config.compute_dtype]
        if self.weight_dtype is torch.float32 and device != "cpu" and _has_bf16(device):
            return torch.bfloat16
        return torch.float32 if self.weight_dtype is torch.float64 else self.weight_dtype

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., in] -> [..., out], in the input's type (under autocast, in autocast's)."""
        x = input  # nn.Linear's own word, for those who call a layer with it
        dtype, given = self.compute_dtype(x), x.dtype
        p, seed = self.lora_dropout, None
        if p and self.training:
            # Drawn from torch's generator: a recomputed forward pass (activation checkpointing) draws it again.
            seed = torch.randint(1 << 62, (1,), device="cpu")
        held: dict[str, Any] = self._parameters  # each `self.lora_A` would cost a search through the module
        packed, absmax, nested = held["packed"], held["absmax"], held["nested"]
        weight = PackedBytes(packed, absmax, nested, self._shape, self.quant_type, self.block_size)
        if given is not dtype:
            x = _cast(x, dtype)
        bias, magnitude = held["bias"], held["lora_magnitude_vector"]
        first = bias if magnitude is None else None
        y = ops.lora_linear(x, weight, first, held["lora_A"], held["lora_B"], self.scaling, p, seed)
        if magnitude is not None:
            y = y * self.gain().to(dtype) + (0 if bias is None else bias.to(dtype))
        return y if given is dtype or torch.is_autocast_enabled(x.device.type) else y.to(given)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module, but for the parts of a weight that ColwiseParallel and RowwiseParallel register."""
        if is_sharded(param):
            raise ValueError(
                f"{self.full_name}: is in 4 bits, and tensor parallelism (parallelize_module) can't split that. Leave "
                "the layer out of the plan, or dense by exclude_modules; fully_shard splits 4-bit layers."
            )
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        """The line `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.quant_type}, block_size={self.block_size}, r={self.r}, scaling={self.scaling:g}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        linear_state.save(self, destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        optional, missing = linear_state.take_base(self, state_dict, prefix), list[str]()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [key for key in missing if key.removeprefix(prefix) not in optional]


class QLoRAConv1D(QLoRALinear):
    """The same for transformers' Conv1D (GPT-2), which keeps its weight as [in, out]."""

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of `weight`, [in, out]."""
        return self._shape[1], self._shape[0]

    def decode(self) -> Tensor:
        """The base weight in the type it came in, [in, out]."""
        return super().decode().T

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, fp32, [in, out]."""
        return super().delta().T

    def forward(self, x: Tensor) -> Tensor:
        """The same, in Conv1D's words."""
        return super().forward(x)

    @staticmethod
    def _as_rows(weight: Tensor) -> Tensor:
        return weight.T


def class_for(dense_class: type[nn.Module]) -> type[QLoRALinear]:
    """What a dense layer of a class becomes: a subclass of nn.Linear stays one, with the methods it adds."""
    if not issubclass(dense_class, nn.Linear):
        return QLoRAConv1D
    if dense_class not in _CLASSES:
        members = {"__module__": dense_class.__module__}
        _CLASSES[dense_class] = type(f"QLoRA{dense_class.__name__}", (QLoRALinear, dense_class), members)
    return _CLASSES[dense_class]


# Attributes that a layer has as long as it is in 4 bits.
ATTRIBUTES = {name for kind in (PackedLinear, AdaptedLinear, QLoRALinear) for name in kind.__annotations__}

_CLASSES: dict[type[nn.Module], type[QLoRALinear]] = {nn.Linear: QLoRALinear}  # dense class -> its 4-bit class


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(
            f"x: must be float32, bfloat16 or float16 (or float64, computed in float32), not {x.dtype}. Cast it first."
        )
    return x.to(dtype)


def _new(dense_class: type[nn.Module]) -> QLoRALinear:
    kind = class_for(dense_class)
    return kind.__new__(kind)


def adapted_layers(module: nn.Module) -> dict[str, QLoRALinear]:
    """Name -> converted layer, each once, in the order of the module."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QLoRALinear)}


def check_start_of_packed(config: QLoRAConfig) -> None:
    """Raise ValueError if adapters are to start from a float weight, which a weight that came in 4 bits hasn't."""
    if config.starts_from_weight:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} starts from the float weight, and this one is in 4 bits "
            "already. Use 'default' or 'gaussian', or load the model in 16 bits."
        )


@cache
def _has_bf16(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return device == "xpu"
