"""Experts in 4 bits: a stack of expert weights, one 3-D parameter, becomes a list of QLoRALinear layers.

    mlp.gate_up_proj                nn.Parameter [experts, out, in] -> QLoRAExperts `mlp.gate_up_proj_experts`
    mlp.gate_up_proj_experts.3      the QLoRALinear of one expert, [out, in]
    mlp.gate_up_proj[3]             its readable weight: `F.linear` on it runs the fused op of that layer
    torch.bmm(x, mlp.gate_up_proj)  the fused op of each expert, for [experts, in, out]
    mlp.forward(...)                of transformers' experts: each expert that tokens reached runs once, on its tokens

Each expert is quantized separately and has its own adapter. Only the experts that tokens reached are decoded, one at a
time, into the buffer that all layers share. The whole stack is decoded only if code reads it in a way that is not in
this list. The module that held the parameter becomes an instance of a subclass of its class.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.kinds import Derived, derives
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.names import expert_name, join, parameter_name, stack_name
from lightning_qlora.layers.qlora_linear import REPLACED, QLoRALinear
from lightning_qlora.layers.readable_weight import Readable, readable_weight
from lightning_qlora.layers.routed_experts import is_routed, routed_forward

PARAMETERS = "_qlora_parameters"  # attribute of a module whose stacks were converted: its parameters' names, in order


class ReadableStack(Readable):
    """What code gets when it reads a stack of experts: W + s B A of each, with gradients for every A and B."""

    _experts: Any  # a QLoRAExperts

    @staticmethod
    def __new__(cls, experts: Any, shape: tuple[int, ...] | None = None, detached: bool = False) -> "ReadableStack":
        """A tensor with the shape, type and device of the parameter, and no memory."""
        first = experts.layers[0]
        trains = torch.is_grad_enabled() and not (detached or first._qlora_disabled)
        stack: ReadableStack = Tensor._make_wrapper_subclass(
            cls, shape or experts.weight_shape, dtype=first.weight_dtype, device=first.packed.device,
            requires_grad=trains and any(parameter.requires_grad for parameter in first.adapter_parameters()),
        )  # fmt: skip
        stack._experts, stack._is_detached = experts, detached
        return stack

    def values(self) -> Tensor:
        """The effective weights."""
        weight: Tensor = self._experts.effective_weight().view(self.shape)
        return weight

    def of_layer(self, layer: QLoRALinear) -> Tensor:
        """The weight of one expert."""
        weight = readable_weight(layer, self._experts.transposed)
        return weight.detach() if self._is_detached else weight

    def detach(self) -> "ReadableStack":
        """The same without a gradient."""
        return ReadableStack(self._experts, tuple(self.shape), detached=True)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stack: Any = args[0] if args else None
        if isinstance(stack, ReadableStack):
            experts = stack._experts
            count, (rows, columns) = len(experts.layers), experts.expert_shape
            if func is Tensor.__getitem__ and _is_number(args[1]) and stack.dim() == 3:
                return stack.of_layer(experts.layers[int(args[1])])
            if func in (Tensor.unbind, torch.unbind, Tensor.__iter__) and len(args) == 1 and not kwargs:
                weights = [stack.of_layer(layer) for layer in experts.layers]
                return iter(weights) if func is Tensor.__iter__ else tuple(weights)
            if func in (Tensor.view, Tensor.reshape) and experts.flat:
                shape = tuple(args[1:] if isinstance(args[1], int) else args[1])
                if shape in ((-1, rows, columns), (count, rows, columns)):
                    return ReadableStack(experts, (count, rows, columns), stack._is_detached)
        elif func in (torch.bmm, Tensor.bmm) and isinstance(args[1], ReadableStack) and args[1]._experts.transposed:
            return torch.stack([layer(x) for layer, x in zip(args[1]._experts.layers, stack.unbind(), strict=True)])
        return super().__torch_function__(func, types, args, kwargs)


def _is_number(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.ndim == 0 and not index.dtype.is_floating_point and index.dtype is not torch.bool
    return isinstance(index, int)


class QLoRAExperts(nn.ModuleList):
    """The experts of one parameter, in 4 bits, each with an adapter."""

    transposed: bool  # one expert of the parameter was [in, out]
    flat: bool  # the parameter was [experts * width, in] (DBRX)

    @staticmethod
    def from_parameter(
        owner: nn.Module, key: str, config: QLoRAConfig, name: str, experts: int, transposed: bool,
        device: torch.device | None = None, seed_name: str | None = None, weights: Iterable[Tensor] | None = None,
    ) -> "QLoRAExperts":  # fmt: skip
        """Replace the parameter `key` of a module by 4-bit layers with adapters, in place.

        The parameter is [experts, out, in], [experts, in, out] (`transposed`) or [experts * width, in]. Its full name
        is `name`, that of expert i `name_experts.i`. The experts are quantized on `device`, None: where the parameter
        is. Seeds are made from `seed_name.i`; None: from `name.i`. If the parameter has no data, `weights` yields the
        weight of each expert in the layout of the parameter.
        """
        vars(owner).setdefault(PARAMETERS, list(owner._parameters))
        stack: Tensor = owner._parameters[key]  # type: ignore[assignment]
        made = QLoRAExperts()
        setattr(stack, REPLACED, made)  # for an optimizer that was created before conversion
        made.flat, made.transposed = stack.ndim == 2, transposed
        weights = stack.detach().view(experts, -1, stack.shape[-1]) if weights is None else weights
        for number, weight in enumerate(weights):
            rows = (weight.T if transposed else weight).contiguous()
            layer = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
            layer._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
            seed = f"{name if seed_name is None else seed_name}.{number}"
            QLoRALinear.from_linear(layer, config, expert_name(name, number), device, seed)
            made.append(layer)
        made.train(owner.training)
        del owner._parameters[key]  # last: while `weights` yields, transformers reads its type
        owner.register_module(stack_name(key), made)
        _restore_order(owner._modules, [stack_name(name) for name in vars(owner)[PARAMETERS]])
        owner.__class__ = class_with_experts(type(owner))
        return made

    @property
    def layers(self) -> list[QLoRALinear]:
        """The experts."""
        return cast(list[QLoRALinear], list(self._modules.values()))

    @property
    def loaded(self) -> bool:
        """Whether it was quantized while its model loaded; see `QLoRALinear`."""
        return self.layers[0].loaded

    @property
    def weight(self) -> Tensor:
        """The stack for code that reads it; see the top of this file."""
        return ReadableStack(self)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        rows, columns = self.expert_shape
        return (len(self) * rows, columns) if self.flat else (len(self), rows, columns)

    @property
    def expert_shape(self) -> tuple[int, int]:
        """Shape of one expert in the parameter."""
        rows, columns = self.layers[0]._shape
        return (columns, rows) if self.transposed else (rows, columns)

    def stack(self, of_layer: Callable[[QLoRALinear], Tensor]) -> Tensor:
        """A tensor of the parameter's shape from one [out, in] of every expert."""
        parts = [of_layer(layer) for layer in self.layers]
        return torch.stack([part.T if self.transposed else part for part in parts]).view(self.weight_shape)

    def effective_weight(self) -> Tensor:
        """W + s B A of all experts, in the parameter's shape; differentiable in the adapters."""
        return self.stack(QLoRALinear.effective_weight)

    def decode(self) -> Tensor:
        """W of all experts, in the parameter's shape."""
        return self.stack(QLoRALinear.decode)

    def restore(self, owner: nn.Module, key: str, stack: Tensor) -> None:
        """Replace these layers by a dense, frozen parameter, in place. After the last, the owner has its old class."""
        del owner._modules[stack_name(key)]
        owner.register_parameter(key, nn.Parameter(stack, requires_grad=False))
        _restore_order(owner._parameters, vars(owner).get(PARAMETERS, []))
        if not any(isinstance(part, QLoRAExperts) for part in owner._modules.values()):
            owner.__class__ = type(owner).dense_class  # type: ignore[attr-defined]


def _restore_order(entries: dict[str, Any], names: list[str]) -> None:
    """Put entries into this order, at the end: optimizers number parameters and PEFT names adapters by their order."""
    for name in names:
        if name in entries:
            entries[name] = entries.pop(name)


class _WithExperts(Derived):
    """What `class_with_experts` adds to a class."""

    def __getattr__(self, name: str) -> Any:
        stack = self.__dict__["_modules"].get(stack_name(name))
        return stack.weight if isinstance(stack, QLoRAExperts) else super().__getattr__(name)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As in nn.Module; a dense parameter in the state becomes the weights of the experts."""
        for name, stack in self.__dict__["_modules"].items():
            key = prefix + parameter_name(name)
            if isinstance(stack, QLoRAExperts) and key in state_dict:
                dense = state_dict.pop(key).contiguous()
                if tuple(dense.shape) != stack.weight_shape:
                    raise CheckpointMismatchError(
                        f"{key}: has shape {list(dense.shape)} in the checkpoint, {list(stack.weight_shape)} here."
                    )
                for number, weight in enumerate(dense.view(len(stack), *stack.expert_shape)):
                    state_dict[f"{prefix}{name}.{number}.weight"] = weight.T if stack.transposed else weight
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


@derives
def class_with_experts(dense_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass in which a parameter that became a QLoRAExperts reads as `QLoRAExperts.weight`."""
    if issubclass(dense_class, _WithExperts):
        return dense_class
    members: dict[str, Any] = {"__module__": dense_class.__module__, "dense_class": dense_class}
    if is_routed(dense_class):
        members["forward"] = routed_forward
    return type(f"QLoRA{dense_class.__name__}", (_WithExperts, dense_class), members)


def expert_stacks(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, QLoRAExperts]]:
    """Full name, owner, key and experts of every stack in a module."""
    for name, owner in module.named_modules():
        for key, part in owner._modules.items():
            if isinstance(part, QLoRAExperts):
                key = parameter_name(key)
                yield join(name, key), owner, key, part


def experts_of(module: nn.Module) -> set[nn.Module]:
    """The layers of all stacks in a module."""
    return {layer for *_, stack in expert_stacks(module) for layer in stack.layers}
