"""QLoRALinear: what an nn.Linear becomes, a frozen 4-bit weight with a LoRA adapter beside it."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora import dora, starts
from lightning_qlora.bnb_layers import CAME_AS
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels import ops
from lightning_qlora.packed_linear import BASE, PackedLinear
from lightning_qlora.quantize.packed import PackedBytes, PackedWeight

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ADAPTER = ("lora_A", "lora_B", "lora_magnitude_vector")  # the parameters that train
INPUT_RMS = "input_rms"  # key of what a "calibrated" start was made from
REPLACED = "_qlora_layer"  # mark, with the layer's name, of a dense weight that conversion replaced
FINGERPRINT = "fingerprint"  # a frozen parameter NAME is kept in a checkpoint as NAME.fingerprint alone


class CheckpointMismatchError(RuntimeError):
    """A checkpoint belongs to another base model, or to adapters of another shape or place."""


class QLoRALinear(PackedLinear):
    """y = x W^T + bias + s (drop(x) A^T) B^T with W frozen in 4 bits and A, B trained (QLoRA paper, equation 5).

    An `nn.Linear` becomes one in place (`from_linear`), so whatever refers to the layer still does. A layer of a class
    derived from it becomes one of both (`class_for`).

    Attributes:
        packed, absmax, nested: The 4-bit weight, frozen uint8 parameters; see `packed_weight`.
        bias: Frozen, [out], or None.
        lora_A: [r, in], fp32; computed in the compute type.
        lora_B: [out, r], fp32.
        lora_magnitude_vector: [out], fp32, with DoRA (see `dora`); None without.
        scaling: The factor s.
        lora_dropout: Probability of dropping an input of the adapter in training.
        dense_weight: The weight [out, in] as it came, in host memory, while a "calibrated" start waits for inputs.
        input_rms: The input sizes [in] that a "calibrated" start was made from.
        loaded: How it was quantized while it was loaded (`loaded.Loaded`); None once conversion has settled the rest.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter | None
    scaling: float
    lora_dropout: float
    config: QLoRAConfig
    full_name: str
    dense_weight: Tensor | None
    input_rms: Tensor | None
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

    def start(self, weight: Tensor, device: torch.device | None = None) -> None:
        """Quantize a dense weight and put the adapter where it starts from that weight."""
        rows = self._as_rows(weight.detach())
        begin = starts.start(rows.to(device or rows.device), self.config, self.full_name)
        self.set_packed_weight(begin.base)
        if self.config.start == "calibrated":
            self.dense_weight = rows.cpu()
        self.set_adapter(begin.lora_a, begin.lora_b)

    def set_adapter(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Write values into the adapter; with DoRA the magnitudes become the rows' norms, which change nothing."""
        self.write("lora_A", lora_a)
        self.write("lora_B", lora_b)
        self.set_magnitudes()

    def set_magnitudes(self) -> None:
        """With DoRA: make the magnitudes the rows' norms; without it, have none."""
        if self.config.use_dora:
            self.write("lora_magnitude_vector", self.row_norm())
        else:
            self.register_parameter("lora_magnitude_vector", None)

    def write(self, name: str, value: Tensor) -> None:
        """Give a parameter of the adapter this value; it is made if there is none."""
        held = self._parameters.get(name)
        if held is None:
            self.register_parameter(name, nn.Parameter(value.to(self.packed.device)))
        elif held.shape != value.shape:
            held.data = value.to(self.packed.device)  # another rank; the same parameter, for what holds it
        else:
            with torch.no_grad():
                getattr(self, name).copy_(value)

    def quantize_weight(self, weight: Tensor, device: torch.device | None = None) -> None:
        """Quantize a dense weight, shaped as this layer's `weight` is, and hold it in place of the one before."""
        config = self.config
        dense = self._as_rows(weight.detach()).to(device or weight.device)
        self.set_packed_weight(ops.quantize(dense, config.quant_type, config.block_size, config.double_quant))

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [p for name in ADAPTER if (p := self._parameters.get(name)) is not None]

    @property
    def r(self) -> int:
        """Rank of the adapter."""
        return self.lora_A.shape[0]

    def delta(self) -> Tensor:
        """What the adapter adds to the weight: s B A, with DoRA g (W + s B A) - W; fp32, shaped as the dense weight."""
        product = self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())
        if self.lora_magnitude_vector is None:
            return product
        base = ops.dequantize(self.weight_bytes, torch.float32)
        return self.gain().detach().unsqueeze(1) * (base + product) - base

    def row_norm(self) -> Tensor:
        """||W + s B A|| of every row, [out], fp32."""
        if self._base_squares is None or self._base_squares.device != self.packed.device:
            self._base_squares = dora.row_squares(self.weight_bytes)
        return dora.row_norm(self.weight_bytes, self._base_squares, self.lora_A, self.lora_B, self.scaling)

    def gain(self) -> Tensor:
        """DoRA's factor g of every output: the magnitude over the row's norm, which counts as a constant; [out]."""
        assert self.lora_magnitude_vector is not None
        return self.lora_magnitude_vector / self.row_norm().clamp_min(torch.finfo(torch.float32).tiny)

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
            seed = torch.randint(1 << 62, (1,))
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

    def extra_repr(self) -> str:
        """The line `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.quant_type}, block_size={self.block_size}, r={self.r}, scaling={self.scaling:g}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The adapter, the bias, and the base: its fingerprint, or with checkpoint="full" bitsandbytes' entries."""
        for name, parameter in self._parameters.items():
            if parameter is not None and name not in BASE:
                destination[prefix + name] = parameter if keep_vars else parameter.detach()
        if self.input_rms is not None:
            destination[prefix + INPUT_RMS] = self.input_rms
        # A base that depends on the last bits of an SVD can't be made again on another machine.
        if self.config.checkpoint == "full" or starts.moves_base(self.config):
            destination.update(self.packed_weight.bnb_state_dict(prefix + "weight"))
        else:
            destination[f"{prefix}weight.{FINGERPRINT}"] = torch.tensor(self.base_fingerprint())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load the adapter; check the base against a fingerprint, or take it from a dense or a packed weight."""
        name = prefix.removesuffix(".") or "the layer itself"
        expected = state_dict.pop(f"{prefix}weight.{FINGERPRINT}", None)
        if expected is not None and int(expected) != self.base_fingerprint():
            raise CheckpointMismatchError(
                f"{name}: the checkpoint was trained on another base weight (fingerprint {int(expected):x} there, "
                f"{self.base_fingerprint():x} here). Load the base model and the quantization arguments it was "
                "trained with."
            )
        self._check_rank(state_dict, prefix, name)
        if prefix + "lora_A" in state_dict:  # an adapter comes with what it started from, or from nothing
            self.input_rms = state_dict.pop(prefix + INPUT_RMS, None)
        loading = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        has_weight = self._load_weight(state_dict, prefix, with_adapter=bool(loading & set(ADAPTER)))
        optional = set(BASE)
        if has_weight and not loading & set(ADAPTER):
            optional |= set(ADAPTER)  # a checkpoint of the dense module: the adapter keeps its start
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [key for key in missing if key.removeprefix(prefix) not in optional]

    def _check_rank(self, state_dict: Mapping[str, Any], prefix: str, name: str) -> None:
        lora_a = state_dict.get(prefix + "lora_A")
        if lora_a is not None and lora_a.shape != self.lora_A.shape:
            raise CheckpointMismatchError(
                f"{name}: the checkpoint's adapter has rank {lora_a.shape[0]} for {lora_a.shape[1]} inputs, this "
                f"layer's has rank {self.r} for {self.in_features}. Set r (or rank_pattern) so that it has "
                f"rank {lora_a.shape[0]}."
            )

    def _load_weight(self, state_dict: dict[str, Any], prefix: str, with_adapter: bool) -> bool:
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            return False
        if weight.is_floating_point() and f"{prefix}weight.absmax" not in state_dict:
            if tuple(self._as_rows(weight).shape) != self._shape:
                raise CheckpointMismatchError(
                    f"{prefix}weight: has shape {list(weight.shape)} in the checkpoint, {list(self.weight.shape)} here."
                )
            depends = self.config.use_dora or self.config.start in ("loftq", "pissa") or self.dense_weight is not None
            if depends and not with_adapter:
                self.start(weight, self.packed.device)
            else:
                self.quantize_weight(weight.to(self.packed.device))
        else:
            loaded = PackedWeight.from_bnb_state_dict(state_dict, prefix + "weight")
            self.set_packed_weight(loaded.to(self.packed.device))
        for key in [key for key in state_dict if key == prefix + "weight" or key.startswith(prefix + "weight.")]:
            del state_dict[key]
        return True


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
