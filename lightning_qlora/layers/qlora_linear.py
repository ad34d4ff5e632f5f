"""QLoRALinear: what an nn.Linear becomes, a frozen 4-bit weight with a LoRA adapter beside it.

    w = dequantize(packed, absmax, nested)            [out, in], into a buffer that all layers share
    xa = dropout(x, p, seed) @ lora_A.T               [..., r], the mask from the seed
    y = x @ w.T + bias + scaling * xa @ lora_B.T

`kernels/reference.py` specifies this, and the gradient. `kernels/lora_linear.py` is the op that `forward` calls.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.derived import Derived, derive, restore
from lightning_qlora.layers.kinds import LINEAR, kind_of
from lightning_qlora.layers.layer_state import SavedLayer
from lightning_qlora.layers.lora_layer import ADAPTER, INITIAL, LoRALayer
from lightning_qlora.layers.packed_layer import PackedLayer
from lightning_qlora.layers.readable_weight import READ_ONLY, readable_weight
from lightning_qlora.layers.tensor_parallel import split, unknown_style
from lightning_qlora.quantization.packed_weight import PackedWeight
from lightning_qlora.starts.starts import check_packed_start
from lightning_qlora.tensors.dtensor import is_sharded

MERGED_ADAPTER = "_qlora_adapter"  # attribute of a parameter of an adapter that was merged: a module and its key there
ROWS = "_qlora_rows"  # attribute of a weight of which rows train: their adapter
REPLACED = "_qlora_layer"  # attribute of a weight that conversion replaced: the layer, or experts, that it became


class QLoRALinear(Derived, SavedLayer, nn.Linear):
    """y = x W^T + bias + s (drop(x) A^T) B^T with W frozen in 4 bits and A, B trained (QLoRA paper, equation 5).

    An `nn.Linear` becomes one in place (`from_linear`), so every reference to the layer stays valid. A layer of a
    subclass of nn.Linear becomes an instance of that subclass and of this class, and keeps its methods.
    The bias is frozen. `PackedLayer` has the 4-bit weight, `LoRALayer` the adapter.

    Attributes:
        lora_A: A, a parameter [r, in_features] in fp32.
        lora_B: B, a parameter [out_features, r] in fp32.
        bias: The bias of the layer, frozen, or None.
        in_features: Width of the input.
        out_features: Width of the output.
        weight: W + s B A [out_features, in_features], in the type of the float weight; read-only.
        packed_weight: W in 4 bits, a `PackedWeight`.

    Example:
        ```python
        import torch
        from lightning_qlora import QLoRALinear, convert
        from torch import nn

        model = nn.Sequential(nn.Linear(64, 32))
        convert(model, r=4)
        layer = model[0]
        assert isinstance(layer, QLoRALinear) and isinstance(layer, nn.Linear)
        print(layer.lora_A.shape, layer.lora_B.shape, layer.packed_weight.nbytes)
        assert torch.equal(layer.weight, layer.decode())  # B = 0 at first
        ```
    """

    _layer_kind = LINEAR  # of the dense layer
    _split: Any = None  # with tensor parallelism: a `tensor_parallel.Split`

    @classmethod
    def _derived_bases(cls, before: type[Any]) -> tuple[type, ...]:
        return (cls, before) if kind_of(before).forward is None else (cls,)

    @classmethod
    def _derived_members(cls, before: type[Any]) -> dict[str, Any]:
        kind = kind_of(before)
        members: dict[str, Any] = {"_layer_kind": kind, "_transposed": kind.transposed}
        if hasattr(before, "__deepcopy__") and not issubclass(before, nn.Linear):
            members["__deepcopy__"] = None  # one that calls the class would make a dense layer
        if kind.forward is not None:
            members["forward"] = kind.forward
        else:
            members["forward"] = _forward_of(before)
        return members

    @staticmethod
    def from_linear(
        layer: nn.Module, config: QLoRAConfig, name: str, device: torch.device | None, seed_name: str
    ) -> "QLoRALinear":
        """Turn a layer of one of the `kinds` into a QLoRALinear, in place.

        It is quantized on `device`, None: where the weight is. `config` has the rank and lora_alpha of this layer.
        The seed of the adapter is made from `seed_name`, the same on every rank. After an error the layer is as before.
        """
        before = type(layer), {**vars(layer)}, {**layer._parameters}
        weight: Any = layer._parameters.pop("weight")
        setattr(weight, REPLACED, layer)  # for an optimizer that was created before conversion
        new: QLoRALinear = derive(QLoRALinear, layer)
        try:
            new.set_arguments(config, name, seed_name)
            new.initialize(weight, device)
        except BaseException:
            layer.__class__ = before[0]
            for contents, own in zip((layer._parameters, vars(layer)), (before[2], before[1]), strict=True):
                contents.clear()
                contents.update(own)
            raise
        new.out_features, new.in_features = new._shape
        return new

    @staticmethod
    def from_packed(
        layer: nn.Module,
        weight: PackedWeight,
        dense_class: type[nn.Module],
        config: QLoRAConfig,
        name: str,
        seed_name: str,
    ) -> "QLoRALinear":
        """As `from_linear`, with a weight [out, in] that is in 4 bits already; its bytes do not change.

        A weight that the layer has is removed. `dense_class` is the class after `merge`. The quantization that `config`
        names is ignored.

        Raises:
            ValueError: If the adapter is to be initialized from the float weight.
        """
        check_packed_start(config)
        layer._parameters.pop("weight", None)
        new: QLoRALinear = derive(QLoRALinear, layer, dense_class)
        new.set_arguments(config, name, seed_name)
        new.set_packed_weights([weight])
        new.out_features, new.in_features = new._shape
        new.reset_adapter()
        return new

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W + s B A for code that reads it, read-only; see `readable_weight`. `decode()` gives W alone."""
        return readable_weight(self, self._transposed)

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., in] -> [..., out], in the type of the input (under autocast, in autocast's)."""
        return self.linear(input, self._parameters["bias"])

    def linear_by_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What `F.linear(x, layer.weight, bias)` computes."""
        # A plan of transformers (tp_plan) replaces the layer's `forward` by one that calls nn.Linear's.
        self.__dict__["weight_was_read"] = "forward" not in self.__dict__
        return self.linear(x, bias)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same as `forward` with a bias of the caller's."""
        if x.is_nested or x.layout is not torch.strided:
            return self._of_other_layout(x, bias)
        call = None
        if not torch.compiler.is_compiling():
            if type(x) is not Tensor and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__:
                if has_torch_function_unary(x):  # as a function of torch: its class makes the output one of its own
                    return handle_torch_function(self.linear, (x,), x, bias)
                if type(x) is not nn.Parameter:
                    x = x.as_subclass(Tensor)  # the op for what is no Tensor has no second derivative
            call = self._prepared
        try:
            if call is None or call.facts != call.facts_of(self, x, bias):
                if self._split is not None:
                    return self._split.linear(self, x, bias)  # type: ignore[no-any-return]
                # Each `self.lora_A` would cost a search through the module.
                parameters = map(self._parameters.get, self.parameter_names)
                call = self.prepare(x, self.matrix_class(self.weight_bytes, *parameters), bias)
                if call.facts is not None:
                    self.__dict__["_prepared"] = call
            y: Tensor = call.run(self, x)
            return y
        except (TypeError, ValueError) as error:
            raise self._named(error, x) from error

    def _of_other_layout(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same of a nested or sparse tensor; of a sparse one the output is dense, as that of nn.Linear."""
        if not x.is_nested:
            return self.linear(x.to_dense(), bias)
        if x.layout is torch.jagged:
            jagged: Any = x
            values = self.linear(jagged.values(), bias)
            return torch.nested.nested_tensor_from_jagged(
                values, jagged.offsets(), jagged.lengths(), jagged._ragged_idx
            )
        parts = x.unbind()
        outputs = torch.split(self.linear(torch.cat(parts), bias), [len(part) for part in parts])
        return torch.nested.as_nested_tensor(list(outputs))

    def _named(self, error: TypeError | ValueError, x: Tensor) -> TypeError | ValueError:
        """An error of a call with the name of the layer, and for an input of another width with that."""
        name = self.full_name or type(self).__name__
        if self._split is None and x.shape[-1:] != (self.in_features,):
            columns = f"{x.shape[-1]} columns" if x.ndim else "no dimension"
            return ValueError(f"{name}: x has {columns}, the layer takes {self.in_features}.")
        if isinstance(error, TypeError):
            return TypeError(f"{name}: {error}")
        return ValueError(f"{name}: {error}")

    def become_dense(self, weight: nn.Parameter, name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
        """Hooks and the user's attributes stay."""
        self.stop_observing()
        names = {*ADAPTER}  # that a layer has while it is in 4 bits
        for kind in type(self).__mro__:
            if issubclass(kind, PackedLayer):
                names |= kind.__annotations__.keys()
        names -= {*self._layer_kind.sizes}
        others = {key: value for key, value in self._parameters.items() if key not in names}
        for name in names & self.__dict__.keys():
            del self.__dict__[name]
        self._parameters.clear()
        restore(self, QLoRALinear)
        self.register_parameter("weight", weight)
        self._parameters.update(others)  # the bias, and parameters that a subclass of nn.Linear added
        return self

    def split_over(self, mesh: Any, by_inputs: bool) -> None:
        self._split = split(self, mesh, by_inputs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module; refuses a dense weight, and the parts that a style of another kind registers."""
        if is_sharded(param) and self._split is None:
            raise ValueError(f"{self.full_name}: {unknown_style('another style')}")
        if name in ("weight", "weight_orig"):  # layer.weight = Parameter(...), and torch.nn.utils.prune
            raise RuntimeError(f"{self.full_name}.{name} = ...: {READ_ONLY}")
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={getattr(self, 'bias', None) is not None}"


def _forward_of(before: type[Any]) -> Any:
    """The forward pass of a subclass of nn.Linear in 4 bits, whose class may get another `forward` later.

    One of its own reads `self.weight`, or calls nn.Linear's through super().
    """

    def forward(self: QLoRALinear, *args: Any, **kwargs: Any) -> Any:
        if before.forward is nn.Linear.forward:
            return QLoRALinear.forward(self, *args, **kwargs)
        return before.forward(self, *args, **kwargs)

    return forward


# Names that a layer has in 4 bits and nn.Linear lacks; and methods that make a copy from a call of the class.
MEMBERS: set[str] = {"__deepcopy__", "__reduce__", "__reduce_ex__", *ADAPTER, *INITIAL}
for kind in {*QLoRALinear.__mro__} - {*nn.Linear.__mro__}:
    MEMBERS |= {name for name in (*kind.__annotations__, *vars(kind)) if not hasattr(nn.Linear, name)}
MEMBERS -= nn.Linear.__annotations__.keys()


def adapted_layers(module: nn.Module) -> dict[str, LoRALayer]:
    """Name -> converted layer, in the order of the module; a stack of experts by the name of its parameter."""
    return {part.reported_name(name): part for name, part in module.named_modules() if isinstance(part, LoRALayer)}
