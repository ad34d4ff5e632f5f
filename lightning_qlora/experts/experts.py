"""Experts in 4 bits: a stack of expert weights, one 3-D parameter, becomes one layer.

    mlp.gate_up_proj                nn.Parameter [experts, out, in] -> QLoRAExperts `mlp.gate_up_proj_experts`
    mlp.gate_up_proj[3]             the readable weight of one expert: `F.linear` on it runs the fused op
    torch.bmm(x, mlp.gate_up_proj)  the fused op of each expert, for [experts, in, out]
    mlp.forward(...)                of transformers' experts: all experts, on rows sorted by expert

Each expert is quantized separately and has its own adapter. Only the experts that tokens reached are decoded, one at a
time, into the buffer that all layers share; on a GPU one launch decodes inside the product. The whole stack is decoded
only if code reads it in a way that is not in this list. The module that held the parameter becomes an instance of a
subclass of its class.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.experts.readable_stack import ReadableStack
from lightning_qlora.experts.routed_experts import is_routed, join_rows, routed_forward, rows_of_experts
from lightning_qlora.kernels.backends import INTERPRETED
from lightning_qlora.kernels.grouped_linear import can_group, grouped_linear
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import is_plain_call
from lightning_qlora.layers.derived import Derived, derive, restore
from lightning_qlora.layers.layer_state import SavedLayer
from lightning_qlora.layers.names import join, last_part, owner_name, parameter_name, stack_name, stack_of
from lightning_qlora.layers.prepared_call import cast_input
from lightning_qlora.layers.qlora_linear import REPLACED
from lightning_qlora.layers.readable_weight import readable
from lightning_qlora.quantization.packed_weight import PackedBytes, stack_bytes
from lightning_qlora.starts.starts import first_adapter
from lightning_qlora.tensors.dtensor import gather

PARAMETERS = "_qlora_parameters"  # attribute of a module whose stacks were converted: its parameters' names, in order
VIEWS = "_views"  # attribute of a stack: the adapter of each expert, as views of the parameters


class ExpertParameter(NamedTuple):
    """A parameter with the weights of all experts, or the experts in 4 bits that it became while its model loaded.

    It is [experts, out, in], [experts, in, out] or [experts * width, in].
    """

    owner: nn.Module
    key: str  # its name in the owner
    experts: int  # number of experts
    transposed: bool  # whether one expert is [in, out]

    @property
    def layer(self) -> "QLoRAExperts | None":
        """What it became."""
        return stack_of(self.owner, self.key)  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, int]:
        layer = self.layer
        if layer is not None:
            return layer.out_features, layer.in_features
        stack: Any = self.owner._parameters[self.key]
        columns = stack.shape[-1]
        rows = stack.numel() // self.experts // columns
        if self.transposed:
            return columns, rows
        return rows, columns

    def convert(
        self, config: QLoRAConfig, name: str, device: torch.device | None, seed_name: str,
        weights: Iterable[Tensor] | None = None,
    ) -> "QLoRAExperts":  # fmt: skip
        """Replace the parameter by a 4-bit layer with adapters, in place.

        The experts are quantized on `device`, None: where the parameter is. The seed of expert i is made from
        `seed_name.i`. If the parameter has no data, `weights` yields the weight of each expert in its layout.
        """
        owner, key, experts, transposed = self
        vars(owner).setdefault(PARAMETERS, list(owner._parameters))
        parameter: Any = owner._parameters[key]
        stack = QLoRAExperts(transposed, flat=parameter.ndim == 2)
        setattr(parameter, REPLACED, stack)  # for an optimizer that was created before conversion
        stack.set_arguments(config, name, seed_name)
        if weights is None:
            weights = parameter.detach().view(experts, -1, parameter.shape[-1]).unbind()
        stack.initialize(weights, device)
        stack.train(owner.training)
        del owner._parameters[key]  # last: while `weights` yields, transformers reads its type
        owner.register_module(stack_name(key), stack)
        _restore_order(owner._modules, [stack_name(name) for name in vars(owner)[PARAMETERS]])
        derive(_WithExperts, owner)
        return stack


class QLoRAExperts(SavedLayer):
    """The experts of one parameter, in 4 bits, each with an adapter.

    `packed`, `absmax` and `nested` have a row for each expert; lora_A is [experts, r, in], lora_B [experts, out, r].
    """

    def __init__(self, transposed: bool, flat: bool) -> None:
        super().__init__()
        self._transposed = transposed  # one expert of the parameter was [in, out]
        self.flat = flat  # the parameter was [experts * width, in] (DBRX)

    def __len__(self) -> int:
        return self.matrix_count

    def reported_name(self, name: str) -> str:
        return parameter_name(name)

    def weight_name(self, name: str) -> str:
        return name

    def trains_instead(self) -> dict[str, nn.Parameter]:
        prefix = stack_name(last_part(self.full_name))
        return {join(prefix, name): parameter for name, parameter in super().trains_instead().items()}

    def seed_name_of(self, number: int) -> str:
        return f"{self.seed_name}.{number}"

    def reset_adapter(self) -> None:
        names = map(self.seed_name_of, range(len(self)))
        adapters = [first_adapter(self.weight_bytes, self.config, name) for name in names]
        self.set_adapter(*map(self.join_matrices, zip(*adapters, strict=True)))

    def without_weight(self) -> "QLoRAExperts":
        return QLoRAExperts(self._transposed, self.flat)

    def set_matrices(self, matrices: Sequence[PackedBytes], dtype: torch.dtype) -> None:
        self.set_bytes(stack_bytes(matrices), dtype)

    @property
    def matrix_count(self) -> int:
        return self._shape[0]

    def join_matrices(self, matrices: Sequence[Tensor]) -> Tensor:
        return torch.stack([*matrices])

    def split_matrices(self, values: Any) -> Sequence[Tensor]:
        """As in PackedLayer; an iterator, which reads one expert at a time, stays one.

        Autograd stacks the gradients of `unbind` once; those of indexing would be as many tensors of the whole size.
        """
        if isinstance(values, Tensor):
            if values.shape == self.weight_shape:
                values = values.view(len(self), -1, values.shape[-1])
            values = values.unbind()
        matrices: Sequence[Tensor] = values
        return matrices

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self._shape[1]

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self._shape[2]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return readable(ReadableStack, self, None)  # type: ignore[no-any-return]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        rows, columns = self.matrix_shape
        if self.flat:
            return len(self) * rows, columns
        return super().weight_shape

    def as_dense(self, matrices: Sequence[Tensor]) -> Tensor:
        return super().as_dense(matrices).reshape(self.weight_shape)

    def effective_weight(self) -> Tensor:
        return self.as_dense([self.effective_matrix(matrix) for matrix in self.matrices()])

    def matrices(self, numbers: Iterable[int] | None = None) -> list[Any]:
        """Those of these numbers, None: all."""
        weight = self.whole_bytes
        adapter = self._adapter_of_each_matrix()
        numbers = range(len(self)) if numbers is None else numbers
        return [self.matrix_class(weight.expert(i), *(values[i] for values in adapter), i) for i in numbers]

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Rows ends[e - 1] to ends[e] of x [rows, in] through expert e, [rows, out]; rows from the last end give zeros.

        `ends` is int32 [experts]. On a GPU the host does not wait for it.
        """
        has_kernel = (INTERPRETED or x.is_cuda) and not self.matrix_class.reads_weight
        if has_kernel and not torch.compiler.is_compiling():
            y = self._compute_together(x, ends)
            if y is not None:
                return y
        numbers, parts = rows_of_experts(x, ends)
        experts = zip(parts, self.matrices(numbers), strict=True)
        return join_rows([self.compute(rows, matrix, None) for rows, matrix in experts], x, self.out_features)

    def _compute_together(self, x: Tensor, ends: Tensor) -> Tensor | None:
        """All experts in one launch each; None if there are no kernels for them."""
        of_x, in_fp16, of_y = self.types_of_call(x.device, x.dtype)
        rows = x
        if x.dtype is not of_x:
            rows = cast_input(x, of_x)
        lora = LoRA(self.lora_A, self.lora_B, self.scaling, self.lora_dropout, in_fp16=in_fp16)
        if not can_group(rows, self.weight_bytes, lora):
            return None
        if self._qlora_disabled:
            lora = LoRA(self.lora_A.detach(), self.lora_B.detach(), 0.0, in_fp16=in_fp16)
        elif self.lora_dropout and self.training:
            lora = lora._replace(seed=torch.randint(1 << 62, (1,), device="cpu"))
        if self.input_observer is not None:
            for number, part in zip(*rows_of_experts(x, ends), strict=True):
                self.input_observer.add(self, number, part, self.lora_B[number])
        y = grouped_linear(rows, ends, self.weight_bytes, lora)
        return y if y.dtype is of_y else y.to(of_y)

    def _adapter_of_each_matrix(self) -> list[Sequence[Any]]:
        """Views of the parameters, the same until one changes.

        Autograd stacks the gradients of the views of one `unbind` once. With views of its own, each expert that code
        reads would get a gradient of the size of the whole stack.
        """
        parameters = self.adapter_parameters()
        is_plain = is_plain_call(self.packed, parameters[0]) and torch.is_grad_enabled()
        if not is_plain or not all(type(each) is nn.Parameter and each.requires_grad for each in parameters):
            return self._views_of_adapter()
        key = [(id(parameter), parameter.data_ptr(), parameter._version) for parameter in parameters]
        cached: tuple[Any, list[Sequence[Any]], Any] | None = self.__dict__.get(VIEWS)
        if cached is None or cached[0] != key:
            # With the parameters: as long as they exist, no other has the same id and memory.
            cached = key, self._views_of_adapter(), parameters
            self.__dict__[VIEWS] = cached
        return cached[1]

    def _views_of_adapter(self) -> list[Sequence[Any]]:
        parameters = map(self._parameters.get, self.parameter_names)
        return [[None] * len(self) if p is None else self.split_matrices(gather(p)) for p in parameters]

    def __getstate__(self) -> Any:
        """Without the views, which torch does not copy."""
        return {key: value for key, value in super().__getstate__().items() if key != VIEWS}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QLoRAExperts":
        self.__dict__.pop(VIEWS, None)  # they would keep the memory of another device
        super()._apply(fn, recurse)
        return self

    def become_dense(self, weight: nn.Parameter, name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
        """Be replaced by a parameter of the owner, which has its old class after its last stack."""
        self.stop_observing()
        owner = modules[owner_name(name)]
        key = last_part(name)
        del owner._modules[stack_name(key)]
        owner.register_parameter(key, weight)
        _restore_order(owner._parameters, vars(owner).get(PARAMETERS, []))
        if not any(isinstance(part, QLoRAExperts) for part in owner._modules.values()):
            restore(owner, _WithExperts)
        return owner

    def extra_repr(self) -> str:
        return f"experts={len(self)}, {super().extra_repr()}"


def _restore_order(entries: dict[str, Any], names: list[str]) -> None:
    """Put entries into this order, at the end: optimizers number parameters and PEFT names adapters by their order."""
    for name in names:
        if name in entries:
            entries[name] = entries.pop(name)


class _WithExperts(Derived):
    """A class in which a parameter that became a QLoRAExperts reads as `QLoRAExperts.weight`."""

    @classmethod
    def _derived_members(cls, before: type[Any]) -> dict[str, Any]:
        return {"forward": routed_forward} if is_routed(before) else {}

    def __getattr__(self, name: str) -> Any:
        stack = stack_of(self, name)  # type: ignore[arg-type]
        if stack is not None:
            return stack.weight
        return super().__getattr__(name)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As in nn.Module; a dense parameter in the state becomes the weight of the stack."""
        for name, stack in self.__dict__["_modules"].items():
            key = prefix + parameter_name(name)
            if isinstance(stack, QLoRAExperts) and key in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
