"""QLoRALinear: what an nn.Linear becomes, a frozen 4-bit weight with a LoRA adapter beside it.

    w = dequantize(packed, absmax, nested)            [out, in], into a buffer that all layers share
    xa = dropout(x, p, seed) @ lora_A.T               [..., r], the mask from the seed
    y = x @ w.T + bias + scaling * xa @ lora_B.T

`kernels/reference.py` specifies this, and the gradient. `kernels/lora_linear.py` is the op that `forward` calls.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels.lora_linear import lora_linear
from lightning_qlora.kernels.ops import has_autocast
from lightning_qlora.layers.dora import dora_linear
from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.initialization import methods
from lightning_qlora.layers.kinds import Derived, derives, kind_of
from lightning_qlora.layers.layer_state import load_base
from lightning_qlora.layers.lora_layer import INITIAL, TINY, LoRALayer
from lightning_qlora.layers.packed_linear import BASE, PackedLayer
from lightning_qlora.layers.readable_weight import READ_ONLY, readable_weight
from lightning_qlora.layers.tensor_parallel import split_linear, unknown_style
from lightning_qlora.quantization.packed_weight import PackedBytes, PackedWeight

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPLACED = "_qlora_layer"  # attribute of a weight that conversion replaced: the layer, or experts, that it became


class QLoRALinear(Derived, LoRALayer, nn.Linear):
    """y = x W^T + bias + s (drop(x) A^T) B^T with W frozen in 4 bits and A, B trained (QLoRA paper, equation 5).

    An `nn.Linear` becomes one in place (`from_linear`), so every reference to the layer stays valid. A layer of a
    subclass of nn.Linear becomes an instance of that subclass and of this class (`class_for`).
    The bias is frozen. `PackedLayer` has the 4-bit weight, `LoRALayer` the adapter.
    """

    lora_dropout: float  # probability of dropping an input of the adapter in training
    loaded: bool = False  # whether it was quantized while its model loaded, and no module with it was converted

    @staticmethod
    def from_linear(
        layer: nn.Module, config: QLoRAConfig, name: str, device: torch.device | None, seed_name: str
    ) -> None:
        """Turn a layer of one of the `kinds` into a QLoRALinear, in place.

        It is quantized on `device`, None: where the weight is. `config` is for this layer (`QLoRAConfig.for_layer`).
        The seed of the adapter is made from `seed_name`, the same on every rank.
        """
        weight: Tensor = layer._parameters.pop("weight")  # type: ignore[assignment]
        setattr(weight, REPLACED, layer)
        QLoRALinear._become(layer, type(layer), config, name, seed_name).initialize(weight, device)
        layer.out_features, layer.in_features = layer._shape  # type: ignore[misc]

    @staticmethod
    def from_packed(
        layer: nn.Module,
        weight: PackedWeight,
        dense_class: type[nn.Module],
        config: QLoRAConfig,
        name: str,
        seed_name: str,
    ) -> None:
        """The same with a weight [out, in] that is in 4 bits already; its bytes do not change.

        A weight that the layer has is removed. `dense_class` is the class after `merge`. The quantization that `config`
        names is ignored.

        Raises:
            ValueError: If the adapter is to be initialized from the float weight.
        """
        check_packed_initialization(config)
        layer._parameters.pop("weight", None)
        new = QLoRALinear._become(layer, dense_class, config, name, seed_name)
        new.set_packed_weight(weight)
        new.out_features, new.in_features = new._shape
        new.set_adapter(*methods.random_adapter(new.in_features, new.out_features, config, seed_name))

    @staticmethod
    def _become(
        layer: nn.Module, dense_class: type[nn.Module], config: QLoRAConfig, name: str, seed_name: str
    ) -> "QLoRALinear":
        layer.__dict__.update(
            dense_class=dense_class,
            config=config,
            full_name=name,
            seed_name=seed_name,
            scaling=config.scaling,
            lora_dropout=config.lora_dropout,
        )
        layer.__class__ = class_for(dense_class)
        assert isinstance(layer, QLoRALinear)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        return layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W + s B A for code that reads it, read-only; see `readable_weight`. `decode()` gives W alone."""
        return readable_weight(self, self._transposed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QLoRALinear":
        """As in nn.Module; a cast between loading and conversion leaves the adapter in fp32."""
        values = [parameter.data for parameter in self.adapter_parameters()] if self.loaded else []
        super()._apply(fn, recurse)
        for parameter, value in zip(self.adapter_parameters(), values, strict=False):
            parameter.data = value.to(parameter.device)
        return self

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The type this call computes in: autocast's, else the configured one, else the weight's (fp32 for fp64)."""
        device = x.device.type
        if has_autocast(device):
            return torch.get_autocast_dtype(device)
        if self.config.compute_dtype != "auto":
            return DTYPES[self.config.compute_dtype]
        if self.weight_dtype is torch.float32 and device != "cpu" and _has_bf16(device):
            return torch.bfloat16
        return torch.float32 if self.weight_dtype is torch.float64 else self.weight_dtype

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., in] -> [..., out], in the type of the input (under autocast, in autocast's)."""
        return self.linear(input, self._parameters["bias"])

    def linear_by_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What `F.linear(x, layer.weight, bias)` computes."""
        # A plan of transformers (tp_plan) replaces the layer's `forward` by one that calls nn.Linear's.
        self.__dict__["weight_was_called"] = "forward" not in self.__dict__
        return self.linear(x, bias)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same as `forward` with a bias of the caller's."""
        parameters: dict[str, Any] = self._parameters  # each `self.lora_A` would cost a search through the module
        a = parameters["lora_A"]
        b = parameters["lora_B"]
        magnitude = parameters["lora_magnitude_vector"]
        try:
            if self._split is not None:
                return split_linear(self, x, bias)
            return self.compute(x, self.weight_bytes, bias, a, b, magnitude)
        except (TypeError, ValueError) as error:
            raise self._named(error, x) from error

    def _named(self, error: TypeError | ValueError, x: Tensor) -> TypeError | ValueError:
        """An error of a call with the name of the layer, and for an input of another width with that."""
        name = self.full_name or type(self).__name__
        if self._split is None and x.shape[-1:] != (self.in_features,):
            columns = f"{x.shape[-1]} columns" if x.ndim else "no dimension"
            return ValueError(f"{name}: x has {columns}, the layer takes {self.in_features}.")
        if isinstance(error, TypeError):
            return TypeError(f"{name}: {error}")
        return ValueError(f"{name}: {error}")

    def compute(
        self,
        x: Tensor,
        weight: PackedBytes,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor | None,
        rank: int = 0,
    ) -> Tensor:
        """The same with the parameters of the layer, or with a part of them; ranks with other numbers drop others."""
        input_dtype = x.dtype
        dtype = self.compute_dtype(x)
        if input_dtype is not dtype:
            x = cast_input(x, dtype)
        p = self.lora_dropout
        seed = None
        if self._qlora_disabled:
            a = x.new_empty(0, a.shape[1])  # rank 0
            b = x.new_empty(b.shape[0], 0)
            magnitude = None
        else:
            if not torch.compiler.is_compiling():
                self.__dict__["was_called"] = True  # faster than nn.Module's __setattr__
            if p and self.training:
                # Drawn from torch's generator: a recomputed forward pass (activation checkpointing) draws it again.
                seed = torch.randint(1 << 62, (1,), device="cpu")
                if rank:
                    seed ^= rank << 32
        if magnitude is None:
            y = lora_linear(x, weight, bias, a, b, self.scaling, p, seed)
        else:
            norm = self.row_norm(a, b, weight).clamp_min(TINY)
            y = dora_linear(x, weight, bias, a, b, magnitude, norm, self.scaling, p, seed)
        if input_dtype is dtype or has_autocast(x.device.type):
            return y
        return y.to(input_dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module; refuses a dense weight, and the parts that a style of another kind registers."""
        if is_sharded(param) and self._split is None:
            raise ValueError(f"{self.full_name}: {unknown_style('another style')}")
        if name in ("weight", "weight_orig"):  # layer.weight = Parameter(...), and torch.nn.utils.prune
            raise RuntimeError(f"{self.full_name}.{name} = ...: {READ_ONLY}")
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        """The line `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.quant_type}, block_size={self.block_size}, r={self.r}, scaling={self.scaling:g}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Without the base, which the hook of the converted module writes, or a fingerprint of it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in BASE:
            destination.pop(prefix + name, None)  # it is there if a strategy splits the weight
        if self.initial is not None:
            destination.update({prefix + name: getattr(self, name) for name in INITIAL})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        metadata, strict, missing_keys, *others = arguments
        optional = load_base(self, state_dict, prefix)
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)
        missing_keys += [key for key in missing if key.removeprefix(prefix) not in optional]


@derives
def class_for(dense_class: type[nn.Module]) -> type[QLoRALinear]:
    """The 4-bit class for a dense class; that for a subclass of nn.Linear keeps its methods, a forward included."""
    if dense_class is nn.Linear:
        return QLoRALinear
    kind = kind_of(dense_class)
    members: dict[str, Any] = {"__module__": dense_class.__module__, "_transposed": kind.transposed}
    if kind.forward is not None:
        members["forward"] = kind.forward
    elif dense_class.forward is not nn.Linear.forward:
        members["forward"] = dense_class.forward  # it reads `self.weight`, or calls nn.Linear's through super()
    bases = (QLoRALinear, dense_class) if issubclass(dense_class, nn.Linear) else (QLoRALinear,)
    return type(f"QLoRA{dense_class.__name__}", bases, members)


MEMBERS: set[str] = set()  # names that a layer has in 4 bits and nn.Linear lacks
for kind in (PackedLayer, LoRALayer, QLoRALinear):
    MEMBERS |= {name for name in (*kind.__annotations__, *vars(kind)) if not hasattr(nn.Linear, name)}


def cast_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the type that a layer computes in; TypeError for integers, to which the result would be rounded."""
    if not x.is_floating_point():
        raise TypeError(
            f"x: must be float32, bfloat16 or float16 (or float64, computed in float32), not {x.dtype}. Cast it first."
        )
    return x.to(dtype)


def adapted_layers(module: nn.Module) -> dict[str, QLoRALinear]:
    """Name -> converted layer, each once, in the order of the module."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QLoRALinear)}


def computes_in_fp16(module: nn.Module) -> bool:
    """Whether a converted layer computes in fp16, outside of autocast."""
    return any(layer.compute_dtype(layer.packed) is torch.float16 for layer in adapted_layers(module).values())


def check_packed_initialization(config: QLoRAConfig) -> None:
    """Raise ValueError if adapters are to be initialized from the float weight of a layer that is in 4 bits already."""
    if config.initializes_from_weight:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} needs the float weight, and this one is in 4 bits. "
            "Use 'default' or 'gaussian', or load the model in 16 bits."
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a question to the driver can't be traced
def _has_bf16(device: str) -> bool:
    """Whether the card computes in bf16. A Turing card (T4) emulates it, slower than fp32, so fp32 models stay in fp32.

    They do not get fp16, which would use its tensor cores: fp16 training diverges in one of five runs according to the
    authors of QLoRA. `compute_dtype="fp16"` chooses it.
    """
    return device == "xpu" or (device == "cuda" and _cuda_has_bf16())


@cache
def _cuda_has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
