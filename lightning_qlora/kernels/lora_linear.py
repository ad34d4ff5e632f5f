"""The layer y = x W^T + bias + s (drop(x) A^T) B^T with its gradient, from the ops of `ops`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_qlora.checks import TRAIN_IN_FULL
from lightning_qlora.kernels import ops, reference
from lightning_qlora.kernels.lora import LoRA, check_operands
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
        y: Tensor = torch.ops.lightning_qlora.lora_linear(x, *weight, bias, *lora)[0]
        return y
    check_operands(x, weight, bias, lora)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    needs_no_gradient = not torch.is_grad_enabled() and forward_ad._current_level < 0
    if needs_no_gradient and ops.layer_in_one_call(y, x, weight, bias, lora):
        return y
    with ops.no_autocast(x):
        with torch.no_grad():
            rows, xa = ops.lora_project(x, lora)  # drop(x) A^T
        # Before the large product: when activation checkpointing recomputes a block, torch stops as soon as all tensors
        # are saved, and skips the decoding and the product of the last layer.
        # One argument for all that has no gradient: `apply` and autograd do something for each.
        y = _Gradient.apply(y, x, bias, lora.a, lora.b, (xa, weight, lora[2:]))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            ops.linear_into(y, rows, xa, weight, bias, lora)  # s xa B^T + x W^T + bias
    return y


class _Gradient(torch.autograd.Function):
    """The gradient of y, which `lora_linear` writes after this: `forward` saves what the backward pass needs.

    Used outside of torch.compile: `torch.library` has more overhead than a small layer takes to compute. Without grad
    mode too, since a Function without `jvp` refuses forward-mode differentiation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        rest: tuple[Tensor, PackedBytes, tuple[Any, ...]],
    ) -> Tensor:
        xa, ctx.weight, ctx.choices = rest
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, xa, lora_a, lora_b)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, lora_a, lora_b = ctx.saved_tensors
        _, needs_x, needs_bias, *_ = ctx.needs_input_grad
        lora = LoRA(lora_a, lora_b, *ctx.choices)
        grads: tuple[Tensor | None, ...]
        if _creates_graph():
            grads = _recorded_backward(grad, x, ctx.weight, lora)
        else:
            grads = ops.lora_linear_backward(grad, x, xa, ctx.weight, lora, needs_x)
        of_bias = None
        if needs_bias:
            of_bias = grad_bias(grad)
        return None, grads[0], of_bias, grads[1], grads[2], None


def _creates_graph() -> bool:
    """Whether a backward pass was called with `create_graph=True`: only then it records operations."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _recorded_backward(grad: Tensor, x: Tensor, weight: PackedBytes, lora: LoRA) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, A and B by operations that autograd records, for second derivatives."""
    if lora.in_fp16:
        refuse_second_derivative()
    rows = x.reshape(-1, x.shape[-1])
    grad = grad.reshape(-1, grad.shape[-1])
    with ops.no_autocast(x):
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
    grad_x, grad_a, grad_b = torch.ops.lightning_qlora.lora_linear_backward(
        grad, x, xa, packed, absmax, nested, *form, lora_a, lora_b, scaling, p, seed, in_fp16, needs_x
    )
    of_bias = None
    if needs_bias:
        of_bias = grad_bias(grad)
    return grad_x if needs_x else None, *[None] * 6, of_bias, grad_a, grad_b, *[None] * 4


ops.lora_linear_op.register_autograd(_backward_of_op, setup_context=_save_for_op)


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
