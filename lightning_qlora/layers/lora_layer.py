"""LoRALayer: a 4-bit weight with a LoRA adapter (Hu et al. 2021), and DoRA's magnitudes (`dora.py`).

    y = x W^T + s (drop(x) A^T) B^T

Dropout acts on the input of the adapter alone. A `QLoRALinear` has one matrix W with its adapter, a `QLoRAExperts` one
for each expert.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels import ops
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import lora_linear
from lightning_qlora.kernels.rounding import round_stochastically
from lightning_qlora.layers.disable_adapter import WithAdapter
from lightning_qlora.layers.dora import dora_linear, dora_scale, row_norm
from lightning_qlora.layers.matrix import ADAPTER, Matrix
from lightning_qlora.layers.typed_layer import TypedLayer
from lightning_qlora.starts.input_statistics import InputStatistics
from lightning_qlora.starts.starts import first_adapter, start_of
from lightning_qlora.tensors.dtensor import gather, shard_like
from lightning_qlora.tensors.fingerprint import has_values

INITIAL = ("initial_A", "initial_B")  # their values at the start, if B was not 0


class LoRALayer(WithAdapter, TypedLayer):
    """A 4-bit weight and the adapter that trains: A, B, and with DoRA the magnitudes of the rows.

    The tensors of a stack have a first dimension for the experts.
    """

    in_features: int
    out_features: int
    lora_A: nn.Parameter  # [r, in], fp32; computed in the compute type
    lora_B: nn.Parameter  # [out, r], fp32
    lora_magnitude_vector: nn.Parameter | None  # [out], fp32, with DoRA
    lora_dropout: float  # probability of dropping an input of the adapter in training
    scaling: float  # the factor s
    full_name: str  # in the converted module; not `name`, which a class of the user may have
    seed_name: str  # for both see `names.py`
    adapter_folder: str | None = None  # the last one that an argument named and that was loaded
    loaded: bool = False  # whether no conversion of a module with it has ended: its model was loaded, or an error came
    quantized_by_conversion: bool = False  # whether a conversion chose it; else it was quantized while its model loaded
    input_statistics: InputStatistics | None = None  # "calibrated": until the adapter is initialized
    initial_A: Tensor | None = None  # what A and B began with, if B was not 0; in host memory
    initial_B: Tensor | None = None
    was_called: bool = False  # whether the op of the layer ran
    weight_was_read: bool = False  # whether other code read the weight
    weight_was_called: bool = False  # whether other code passed the weight to F.linear or matmul

    def set_arguments(self, config: QLoRAConfig, name: str, seed_name: str) -> None:
        self.set_config(config)
        self.full_name = name
        self.seed_name = seed_name
        self.lora_dropout = config.lora_dropout

    def set_config(self, config: QLoRAConfig) -> None:
        self.config = config
        self.scaling = config.scaling

    def initialize(self, weight: Tensor | Iterable[Tensor], device: torch.device | None = None) -> None:
        """Quantize a float weight and initialize the adapter; both are computed on `device`.

        The weight of a stack has the shape of the parameter, or yields the weight of each expert.
        """
        weights = []
        bases = []
        config = self.config
        observer = start_of(config).observer
        for dense in self.split_matrices(weight):
            rows = self._as_stored(dense.detach())
            values = rows
            if not rows.is_meta:  # else they are read later
                values = rows.to(device or rows.device)
            quantize = ops.quantize_bytes if has_values(values) else ops.quantize_unchecked
            bases.append(quantize(values, config.quant_type, config.block_size, config.double_quant))
            if observer is not None:
                if not rows.is_meta:
                    rows = rows.cpu()
                weights.append(rows)
        self.set_matrices(bases, rows.dtype)
        if observer is not None:
            self.input_statistics = observer(self, self.join_matrices(weights))
        self.reset_adapter()

    def __setstate__(self, state: Any) -> None:
        """A copy waits for inputs together with this layer."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.input_statistics is not None:
            self.input_statistics.join(self)

    def reset_adapter(self) -> None:
        """Set A to random values and B to 0."""
        names = map(self.seed_name_of, range(self.matrix_count))
        adapters = [first_adapter(self.weight_bytes, self.config, name) for name in names]
        self.set_adapter(*(self.join_matrices(values) for values in zip(*adapters, strict=True)))

    def seed_name_of(self, number: int) -> str:
        return f"{self.seed_name}.{number}" if self.is_stack else self.seed_name

    def set_adapter(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Set A and B; with DoRA the magnitudes become the norms of the rows, which leaves the output as it was."""
        self.write("lora_A", lora_a)
        self.write("lora_B", lora_b)
        if self.config.use_dora:
            norms = [row_norm(self, matrix) for matrix in self.matrices()]
            self.write("lora_magnitude_vector", self.join_matrices(norms))
        else:
            self.register_parameter("lora_magnitude_vector", None)

    def set_initial(self, adapter: Sequence[Tensor] | None) -> None:
        """Keep copies of the A and B that training begins with: an adapter for the 16-bit base is the difference."""
        values = [value if value.is_meta else value.detach().to("cpu", copy=True) for value in adapter or ()]
        self.initial_A, self.initial_B = values or (None, None)

    @property
    def initial(self) -> tuple[Tensor, Tensor] | None:
        """`initial_A` and `initial_B`; None if training began with B = 0, or from values of another module."""
        return None if self.initial_A is None or self.initial_B is None else (self.initial_A, self.initial_B)

    def matrices(self, numbers: Sequence[int] | None = None) -> list[Matrix]:
        """The matrices of these numbers, None: all; of a sharded layer gathered, so all ranks must ask for them."""
        weight = self.whole_bytes
        adapter = self._adapter_of_each_matrix()
        matrices = []
        for number in range(self.matrix_count) if numbers is None else numbers:
            base = weight.expert(number) if self.is_stack else weight
            matrices.append(Matrix._make((base, *(values[number] for values in adapter), number)))
        return matrices

    def _adapter_of_each_matrix(self) -> list[Sequence[Any]]:
        parameters = map(self._parameters.get, ADAPTER)
        return [[None] * self.matrix_count if p is None else self.split_matrices(gather(p)) for p in parameters]

    def write(self, name: str, value: Tensor) -> None:
        """Set a parameter of the adapter, and create it if it does not exist."""
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

    @property
    def was_read_alone(self) -> bool:
        """Whether other code read the weight, and nothing called the layer."""
        return self.weight_was_read and not self.was_called

    @property
    def is_only_read(self) -> bool:
        """Whether other code multiplied with the weight, or read it, in place of a call of the layer."""
        return self.weight_was_called or self.was_read_alone

    def adapter_parameters(self) -> list[nn.Parameter]:
        parameters = [self._parameters.get(name) for name in ADAPTER]
        return [parameter for parameter in parameters if parameter is not None]

    @property
    def r(self) -> int:
        return self.lora_A.shape[-2]

    def effective_weight(self) -> Tensor:
        """W + s B A, with DoRA g (W + s B A), [out, in], differentiable in the adapter.

        It is in the weight's type, rounded stochastically (`rounding`), each time in the same way.
        """
        return self.join_matrices([self.effective_matrix(matrix) for matrix in self.matrices()])

    def effective_matrix(self, matrix: Matrix) -> Tensor:
        base = ops.dequantize(matrix.weight, self.weight_dtype)
        if self._qlora_disabled:
            return base
        if not torch.compiler.is_compiling():
            self.__dict__["weight_was_read"] = True
        total = base.float() + matrix.product(self.scaling)
        if matrix.lora_magnitude_vector is not None:
            total = dora_scale(self, matrix).unsqueeze(1) * total
        return round_stochastically(total, self.weight_dtype)

    def compute(self, x: Tensor, matrix: Matrix, bias: Tensor | None, rank: int = 0) -> Tensor:
        """The layer with one of its matrices, or a part of it; ranks with other numbers drop others."""
        if self.input_statistics is not None:
            self.input_statistics.add(self, matrix.number, x, matrix.lora_B)
        input_dtype = x.dtype
        x, in_fp16 = self.cast_input(x)
        weight, a, b, magnitude, _ = matrix
        seed = self.dropout_seed(rank)
        if self._qlora_disabled:
            a = x.new_empty(0, a.shape[1])  # rank 0
            b = x.new_empty(b.shape[0], 0)
            magnitude = None
        elif not torch.compiler.is_compiling():
            self.__dict__["was_called"] = True  # faster than nn.Module's __setattr__
        lora = LoRA(a, b, self.scaling, self.lora_dropout, seed, in_fp16)
        if magnitude is None:
            y = lora_linear(x, weight, bias, lora)
        else:
            y = dora_linear(x, weight, bias, lora, magnitude, row_norm(self, matrix))
        return self.cast_output(y, input_dtype)

    def dropout_seed(self, rank: int = 0) -> Tensor | None:
        """A seed for the dropout of one call; None: no dropout.

        Drawn from torch's generator: a recomputed forward pass (activation checkpointing) draws it again.
        """
        if self._qlora_disabled or not (self.lora_dropout and self.training):
            return None
        seed = torch.randint(1 << 62, (1,), device="cpu")
        if rank:
            seed ^= rank << 32
        return seed

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.quant_type}, "
            f"block_size={self.block_size}, r={self.r}, scaling={self.scaling:g}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRALayer":
        """As in nn.Module; a cast between loading and conversion leaves the adapter in fp32."""
        values = []
        if self.loaded:
            values = [parameter.data for parameter in self.adapter_parameters()]
        super()._apply(fn, recurse)
        for parameter, value in zip(self.adapter_parameters(), values, strict=False):
            parameter.data = value.to(parameter.device)
        if self.input_statistics is not None:
            self.input_statistics.to(self.packed.device)
        return self
