"""LoRALayer: a 4-bit weight with a LoRA adapter (Hu et al. 2021), and DoRA's magnitudes (`dora.py`).

    y = x W^T + s (drop(x) A^T) B^T

Dropout acts on the input of the adapter alone. A `QLoRALinear` has one matrix W with its adapter, a `QLoRAExperts` one
for each expert.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels import ops
from lightning_qlora.kernels.rounding import round_stochastically
from lightning_qlora.layers.dora import DoRAMatrix
from lightning_qlora.layers.matrix import Matrix
from lightning_qlora.layers.packed_layer import PackedLayer
from lightning_qlora.layers.prepared_call import PreparedCall
from lightning_qlora.layers.with_adapter import WithAdapter
from lightning_qlora.starts.starts import STARTS, first_adapter
from lightning_qlora.tensors.device_types import DTYPES, has_bf16
from lightning_qlora.tensors.dtensor import gather, shard_like
from lightning_qlora.tensors.values import has_values, moved
from lightning_qlora.texts import join

ADAPTERS: dict[bool, Any] = {
    False: Matrix,
    True: DoRAMatrix,
}  # by `use_dora`
ADAPTER = (*dict.fromkeys(name for kind in ADAPTERS.values() for name in kind._fields[1:-1]),)  # what may train
INITIAL = ("initial_A", "initial_B")  # keys of `LoRALayer.initial` in a state dict


class LoRALayer(WithAdapter, PackedLayer):
    """A 4-bit weight and the adapter that trains.

    The tensors of a stack have a first dimension for the experts.
    """

    config: QLoRAConfig  # the arguments of the conversion, with this layer's r and lora_alpha and without patterns
    matrix_class: Any  # of its adapter: a row of `ADAPTERS`
    in_features: int
    out_features: int
    lora_A: nn.Parameter  # [r, in], fp32; computed in the compute type
    lora_B: nn.Parameter  # [out, r], fp32
    lora_dropout: float  # probability of dropping an input of the adapter in training
    scaling: float  # the factor s
    full_name: str  # in the converted module; not `name`, which a class of the user may have
    seed_name: str  # for both see `names.py`
    adapter_folder: str | None = None  # the last one that an argument named and that was loaded
    # Whether no conversion of a module with it has ended: its model was loaded, or an error came.
    is_unfinished: bool = False
    input_observer: Any = None  # sees the inputs until the adapter is computed from them; in most layers None
    # A and B at the start, in host memory; None if training began with B = 0, or from values of another module.
    initial: tuple[Tensor, Tensor] | None = None
    weight_was_read: bool = False  # by other code, as in `nn.MultiheadAttention`: PEFT's adapters act on calls alone

    def without_weight(self) -> "LoRALayer":
        layer = LoRALayer()
        layer._transposed = self._transposed
        return layer

    def set_arguments(self, config: QLoRAConfig, name: str, seed_name: str) -> None:
        self.set_config(config)
        self.full_name = name
        self.seed_name = seed_name
        self.lora_dropout = config.lora_dropout

    def set_config(self, config: QLoRAConfig) -> None:
        self.config = config
        self.scaling = config.scaling
        self.matrix_class = ADAPTERS[config.use_dora]

    def initialize(self, weight: Tensor | Iterable[Tensor], device: torch.device | None = None) -> None:
        """Quantize a float weight and initialize the adapter; both are computed on `device`.

        The weight of a stack has the shape of the parameter, or yields the weight of each expert.
        """
        weights = []
        bases = []
        config = self.config
        observer = STARTS[config.init_lora_weights].observer
        for dense in self.split_matrices(weight):
            rows = self._as_stored(dense.detach())
            quantize = ops.quantize_unchecked
            values = rows
            if has_values(rows):  # else they are read later
                quantize = ops.quantize_bytes
                values = rows.to(device or rows.device)
            bases.append(quantize(values, config.quant_type, config.block_size, config.double_quant))
            if observer is not None:
                weights.append(moved(rows, "cpu"))
        self.set_matrices(bases, rows.dtype)
        if observer is not None:
            self.input_observer = observer(self, self.join_matrices(weights))
        self.reset_adapter()

    def __setstate__(self, state: Any) -> None:
        """A copy is observed together with this layer."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.input_observer is not None:
            self.input_observer.join(self)

    def stop_observing(self) -> None:
        observer = vars(self).pop("input_observer", None)  # absent, and not None: torch.compile guards on it
        if observer is not None:
            observer.leave(self)

    def reset_adapter(self) -> None:
        self.set_adapter(*first_adapter(self.weight_bytes, self.config, self.seed_name))

    def seed_name_of(self, number: int) -> str:
        return self.seed_name

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Of what trains, in the order of a `Matrix`."""
        return self.matrix_class._fields[1:-1]  # type: ignore[no-any-return]

    def set_adapter(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Set A and B, and what else trains to values that leave the output as it is."""
        self.write("lora_A", lora_a)
        self.write("lora_B", lora_b)
        if self.matrix_class.reads_weight:
            self.matrix_class.complete(self)
        for name in ADAPTER:
            if name not in self.matrix_class._fields:
                self.register_parameter(name, None)

    def set_initial(self, adapter: Sequence[Tensor] | None) -> None:
        """Keep copies of the A and B that training begins with: an adapter for the 16-bit base is the difference."""
        self.initial = None
        if adapter is not None:
            a, b = (moved(value.detach(), "cpu", copy=True) for value in adapter)
            self.initial = a, b

    def matrices(self) -> list[Any]:
        """All of them, of a sharded layer gathered, so all ranks must ask for them."""
        parameters: Iterable[Any] = map(self._parameters.get, self.parameter_names)
        return [self.matrix_class(self.whole_bytes, *map(gather, parameters))]

    def write(self, name: str, value: Tensor) -> None:
        parameter = self._parameters.get(name)
        if parameter is None:
            self.register_parameter(name, nn.Parameter(value.to(self.packed.device)))
        elif parameter.shape != value.shape:
            parameter.data = value.to(self.packed.device)  # another rank: an optimizer keeps the same parameter
            parameter.grad = None
        else:
            with torch.no_grad():
                parameter.copy_(shard_like(value, parameter))

    def quantize_weight(self, weight: Tensor, device: torch.device | None = None) -> None:
        """Quantize a float weight of the shape of `weight` on `device`, None: that of the layer: the new base."""
        self.remember_base()
        device = device or self.packed.device
        rows = [self._as_stored(dense.detach()).to(device) for dense in self.split_matrices(weight)]
        config = self.config
        arguments = config.quant_type, config.block_size, config.double_quant
        self.set_matrices([ops.quantize_bytes(matrix, *arguments) for matrix in rows], weight.dtype)

    def become_dense(self, weight: nn.Parameter, name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
        """Become what it was, with this weight; returns the module that holds the weight then.

        `name`: the layer's reported name among the names of `modules`.
        """
        raise NotImplementedError

    def weight_name(self, name: str) -> str:
        """Of the dense weight, in the module that has a layer of this reported name."""
        return join(name, "weight")

    def adapter_parameters(self) -> list[nn.Parameter]:
        parameters = [self._parameters.get(name) for name in ADAPTER]
        return [parameter for parameter in parameters if parameter is not None]

    def trains_instead(self) -> dict[str, nn.Parameter]:
        return dict(zip(ADAPTER, self.adapter_parameters(), strict=False))

    @property
    def r(self) -> int:
        return self.lora_A.shape[-2]

    def effective_weight(self) -> Tensor:
        """W + s B A, [out, in], differentiable in the adapter.

        It is in the weight's type, rounded stochastically (`rounding`), each time in the same way.
        """
        return self.join_matrices([self.effective_matrix(matrix) for matrix in self.matrices()])

    def effective_matrix(self, matrix: Any) -> Tensor:
        base = ops.dequantize(matrix.weight, self.weight_dtype)
        if self._qlora_disabled:
            return base
        if not torch.compiler.is_compiling():
            self.__dict__["weight_was_read"] = True  # faster than nn.Module's __setattr__
        return round_stochastically(matrix.effective(self, base.float()), self.weight_dtype)

    def compute(self, x: Tensor, matrix: Any, bias: Tensor | None, rank: int = 0) -> Tensor:
        """The layer with one of its matrices, or a part of it; ranks with other numbers drop others."""
        return self.prepare(x, matrix, bias).run(self, x, rank)

    def prepare(self, x: Tensor, matrix: Any, bias: Tensor | None) -> PreparedCall:
        if self.input_observer is not None:
            self.input_observer.add(self, matrix.number, x, matrix.lora_B)
        kind = PreparedCall if self._qlora_disabled else matrix.call
        return kind(self, x, matrix, bias)

    def types_of_call(self, device: torch.device, given: torch.dtype) -> tuple[torch.dtype, bool, torch.dtype]:
        """The type of x in a call with x of a `given` type, whether its products are those of `half.py`; the type of y.

        It multiplies in the configured type, in autocast's, or in the weight's. A GPU multiplies fp32 weights in bf16,
        and in fp16 if it has no bf16. Weights in fp64 are multiplied in fp32. The products of `half.py` are in fp16, of
        x in fp32. Under autocast in fp16 they are plain products, as those of other layers are: the loop that uses it
        scales its loss. y has the type of the given x, under autocast its type, and in a module held in fp32 its own.
        """
        autocast = None
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            autocast = torch.get_autocast_dtype(device.type)
        dtype = self.weight_dtype
        if self.config.compute_dtype != "auto":
            dtype = DTYPES[self.config.compute_dtype]
        elif autocast is not None:
            dtype = autocast
        elif dtype is torch.float64:
            dtype = torch.float32
        elif device.type in ("cuda", "xpu") and dtype is not torch.float16:
            dtype = torch.bfloat16 if has_bf16(device) else torch.float16
        in_fp16 = dtype is torch.float16 and autocast is not torch.float16
        if in_fp16:
            dtype = torch.float32
        if autocast is not None:
            return dtype, in_fp16, autocast
        return dtype, in_fp16, dtype if self.is_held else given

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        dtype, in_fp16, _ = self.types_of_call(device, torch.float32)
        return torch.float16 if in_fp16 else dtype

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.quant_type}, "
            f"block_size={self.block_size}, r={self.r}, scaling={self.scaling:g}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRALayer":
        """As in nn.Module; a cast between loading and conversion leaves the adapter in fp32."""
        values = []
        if self.is_unfinished:
            values = [parameter.data for parameter in self.adapter_parameters()]
        super()._apply(fn, recurse)
        for parameter, value in zip(self.adapter_parameters(), values, strict=False):
            parameter.data = value.to(parameter.device)
        if self.input_observer is not None:
            self.input_observer.to(self.packed.device)
        return self
