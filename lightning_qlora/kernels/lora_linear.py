"""The layer y = x W^T + bias + s (drop(x) A^T) B^T with its gradient, from the ops of `ops`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_qlora.checks import TRAIN_IN_FULL
from lightning_qlora.kernels import ops, reference
from lightning_qlora.kernels.backends import plan_of
from lightning_qlora.kernels.eager import Plan, Types
from lightning_qlora.kernels.half import Half
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.quantization.packed_weight import PackedBytes


def lora_linear(x: Tensor, weight: PackedBytes, bias: Tensor | None, lora: LoRA) -> Tensor:
    """A frozen 4-bit layer with its adapter: y = x W^T + bias + s (drop(x) A^T) B^T.

    Args:
        x: Input [..., in], fp32, bf16 or fp16; the weight is decoded to this type, or to fp16 if `lora.in_fp16`.
        weight: The 4-bit weight, [out, in].
        bias: [out], or None.
        lora: The adapter.

    Raises:
        TypeError: If x has another type.
        ValueError: If the shapes do not fit.
        NotImplementedError: In a transform of torch.func (grad, vjp, jvp, vmap) or in forward-mode differentiation.
    """
    if not is_plain_call(x, lora.a):
        if torch._C._are_functorch_transforms_active():  # the op in `ops` would give jvp zeros
            raise NotImplementedError(
                "4-bit layers do not support the transforms of torch.func (grad, vjp, jvp, vmap, ...). Use backward(), "
                "torch.autograd.grad or torch.autograd.functional.vjp."
            )
        op = torch.ops.lightning_qlora.lora_linear
        if lora.seed is not None:
            op = torch.ops.lightning_qlora.lora_linear_dropout
        y: Tensor = op(x, *weight, bias, *lora)[0]
        return y
    return run_plan(plan_of(x, weight, bias, lora), x, weight, bias, lora)


def run_plan(plan: Plan, x: Tensor, weight: PackedBytes, bias: Tensor | None, lora: LoRA) -> Tensor:
    """The same by the plan of these operands, which was asked for, for a call in which `is_plain_call`."""
    has_grad_mode = torch.is_grad_enabled()
    has_graph = has_grad_mode or forward_ad._current_level >= 0  # a Function without `jvp` refuses forward mode
    has_autocast = torch.is_autocast_enabled(plan.kind)
    try:
        torch._C._set_grad_enabled(False)
        if has_autocast:  # kernels write x's type by address, so it must not give torch's products another type
            torch.set_autocast_enabled(plan.kind, False)
        rows = x if plan.takes_x else plan.rows(x, lora.seed)
        xa = None
        if has_graph or lora.seed is not None or not plan.in_one_call:
            xa = plan.lora_project(rows, lora)
        if has_graph:
            torch._C._set_grad_enabled(has_grad_mode)
            # Before the large product: when activation checkpointing recomputes a block, torch stops as soon as all
            # tensors are saved, and skips the decoding and the product of the last layer.
            y: Tensor = _node(x, bias, lora.a, lora.b, (rows, xa, plan, weight, lora[2:]))
            torch._C._set_grad_enabled(False)
        else:
            y = x.new_empty(plan.shape, dtype=plan.y_dtype)
        out = y if plan.is_matrix else plan.matrix(y)
        plan.linear_into(out, rows, xa, weight, bias, lora)  # s xa B^T + x W^T + bias
    finally:
        torch._C._set_grad_enabled(has_grad_mode)
        if has_autocast:
            torch.set_autocast_enabled(plan.kind, True)
    return y


class _Gradient(torch.autograd.Function):
    """The gradient of y, which `lora_linear` writes after this: `forward` saves what the backward pass needs.

    Used outside of torch.compile: `torch.library` has more overhead than a small layer takes to compute.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, rest: tuple[Any, ...]
    ) -> Tensor:
        """One argument for all that has no gradient: `apply` and autograd do something for each."""
        rows, xa, *ctx.rest = rest
        ctx.is_dropped = False
        if isinstance(rows, Half):  # half of the bytes, and no second cast
            ctx.is_dropped = rows.dropped is not None
            if ctx.is_dropped:  # it alone has a gradient to compute
                rows = rows.dropped
            ctx.save_for_backward(rows.values, xa, lora_a, lora_b, rows.factor)
        else:
            ctx.save_for_backward(x, xa, lora_a, lora_b)
        plan: Plan = ctx.rest[0]
        return x.new_empty(plan.shape, dtype=plan.y_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, a, b, *factor = ctx.saved_tensors  # once: a recomputed block does not give them twice
        if factor:
            x = Half(x, *factor)
            if ctx.is_dropped:
                x = x._replace(dropped=x)
        needs_x, needs_bias, *_ = ctx.needs_input_grad
        plan, weight, choices = ctx.rest
        lora = LoRA(a, b, *choices)
        grads: tuple[Tensor | None, ...]
        if torch.is_grad_enabled() and _creates_graph():
            grads = _recorded_backward(grad, x, weight, lora, plan.types)
        else:
            operands = x.shape, x.dtype, xa.shape, xa.dtype, a.shape, a.dtype, a.device, b.shape, b.dtype, b.device
            if operands != plan.operands:  # `.data =` since the forward pass, or hooks of saved tensors that cast
                plan = _plan_of_backward(x, xa, weight, lora, plan.types)
            grads = plan.gradients(grad, x, xa, weight, lora, needs_x)
        of_bias = None
        if needs_bias:
            of_bias = grad_bias(grad)
        return grads[0], of_bias, grads[1], grads[2], None


# `Function.apply` asks whether a transform of functorch is active, which was asked.
_node: Any = super(torch.autograd.Function, _Gradient).apply


def _plan_of_backward(x: Tensor, xa: Tensor, weight: PackedBytes, lora: LoRA, types: Types | None) -> Plan:
    """Of operands that differ from those of the forward pass."""
    plan = plan_of(x, weight, None, lora, types)
    if xa.shape[1] != plan.r:
        raise RuntimeError(
            f"The adapter had rank {xa.shape[1]} in the forward pass, and has rank {plan.r} in its backward pass. Set "
            "another rank after it."
        )
    return plan


def _creates_graph() -> bool:
    """Whether a backward pass was called with `create_graph=True`: only then it records operations."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _recorded_backward(
    grad: Tensor, x: Tensor, weight: PackedBytes, lora: LoRA, types: Types | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, A and B by operations that autograd records, for second derivatives."""
    if lora.in_fp16:
        refuse_second_derivative()
    rows = x.reshape(-1, x.shape[-1])
    grad = grad.reshape(-1, grad.shape[-1])
    if types is not None:
        rows, grad = rows.to(types[0]), grad.to(types[0])
    with torch.autocast(x.device.type, enabled=False):
        xa = reference.lora_project(rows, lora)
        added, grad_a, grad_b = reference.adapter_backward(grad, rows, xa, lora)
        grad_x = _TimesWeight.apply(grad, weight, False) + added  # type: ignore[no-untyped-call]
    return grad_x.to(x.dtype).view(x.shape), grad_a, grad_b


class _TimesWeight(torch.autograd.Function):
    """X W, or X W^T, in fp32. It keeps no decoded weight, and has derivatives of every order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedBytes, transposed: bool) -> Tensor:
        ctx.weight = weight
        ctx.transposed = transposed
        if not weight.packed.untyped_storage().nbytes():
            raise RuntimeError(
                "FSDP2 has freed the 4-bit weight after the first backward pass, so there is no second derivative, as "
                "with dense layers. Use one device or DDP for such a loss."
            )
        matrix = ops.dequantize(weight, x.dtype).float()
        return x.float() @ (matrix.T if transposed else matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        of_x: Tensor = _TimesWeight.apply(grad, ctx.weight, not ctx.transposed)  # type: ignore[no-untyped-call]
        return of_x, None, None


def refuse_second_derivative() -> None:
    """Raise RuntimeError with `create_graph=True`.

    Torch's `once_differentiable` would return gradients without a graph where the gradient of the output has none.
    """
    if _creates_graph():
        raise RuntimeError(
            "create_graph=True: there is no second derivative with use_dora=True, products in fp16, experts in one "
            f"function or tiles of tokens. For parts that need one, {TRAIN_IN_FULL}."
        )


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, packed, absmax, nested, *form, _, lora_a, lora_b, scaling, p, seed, in_fp16 = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], packed, absmax, nested, lora_a, lora_b, seed)
    ctx.choices = form, scaling, p, in_fp16


def _backward_of_op(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, xa, packed, absmax, nested, lora_a, lora_b, seed = ctx.saved_tensors
    form, scaling, p, in_fp16 = ctx.choices
    needs_x = ctx.needs_input_grad[0]
    needs_bias = ctx.needs_input_grad[7]
    op = torch.ops.lightning_qlora.lora_linear_backward
    if seed is not None:
        op = torch.ops.lightning_qlora.lora_linear_backward_dropout
    grad_x, grad_a, grad_b = op(
        grad, x, xa, packed, absmax, nested, *form, lora_a, lora_b, scaling, p, seed, in_fp16, needs_x
    )
    of_bias = None
    if needs_bias:
        of_bias = grad_bias(grad)
    return grad_x if needs_x else None, *[None] * 6, of_bias, grad_a, grad_b, *[None] * 4


for op in ops.LAYER_OPS:
    op.register_autograd(_backward_of_op, setup_context=_save_for_op)


def grad_bias(grad: Tensor) -> Tensor:
    """The gradient of a bias: the sum over rows. Autograd casts it to the type of the bias."""
    return grad.reshape(-1, grad.shape[-1]).sum(0)


def is_plain_call(x: Tensor, lora_a: Tensor) -> bool:
    """Whether torch runs op by op on plain tensors with data: no compiler, tracer, transform, subclass or mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or x.is_meta
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
        or (type(lora_a) is not torch.nn.Parameter and type(lora_a) is not Tensor)
        or torch._C._len_torch_dispatch_stack()
    )
