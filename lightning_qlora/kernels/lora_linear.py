"""The op of a layer, y = x W^T + bias + s (drop(x) A^T) B^T with W in 4 bits: schema, checks, fake and gradient.

It keeps x and drop(x) A^T for the backward pass. Where nobody watches the ops (no compiler, no transform) it goes by an
autograd.Function, since torch.library costs more than all the arithmetic of a small layer.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_qlora.config import QuantType
from lightning_qlora.kernels.backends import backend
from lightning_qlora.kernels.codec import FLOATS, check_bytes
from lightning_qlora.quantize.packed import PackedBytes


def lora_linear(
    x: Tensor, weight: PackedBytes, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float, p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Frozen 4-bit base and adapter in one op: y = x W^T + bias + s (drop(x) A^T) B^T.

    Args:
        x: Input [..., in], fp32, bf16 or fp16; the weight is decoded to this type.
        weight: The 4-bit weight, [out, in].
        bias: [out], or None.
        lora_a: [r, in], any float type.
        lora_b: [out, r], any float type.
        scaling: The factor s.
        p: Probability of dropping an input of the adapter.
        seed: int64 [1] on the CPU: what the dropout mask is made from, and made again in backward; None: no dropout.
    """
    if _is_plain(x, lora_a):
        if not torch.is_grad_enabled():
            return _forward(x, weight, bias, lora_a, lora_b, scaling, p, seed)[0]
        y = _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scaling, p, seed)  # type: ignore[no-untyped-call]
        return cast(Tensor, y)
    _refuse_transforms(x, bias, lora_a, lora_b)
    y, _ = torch.ops.lightning_qlora.lora_linear(
        x, weight.packed, weight.absmax, weight.nested, bias, lora_a, lora_b, seed, weight.shape[0], weight.quant_type,
        weight.block_size, scaling, p,
    )  # fmt: skip
    return cast(Tensor, y)


@torch.library.custom_op("lightning_qlora::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, nested: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor,
    seed: Tensor | None, out_features: int, quant_type: str, block_size: int, scaling: float, p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    weight = PackedBytes(packed, absmax, nested, (out_features, x.shape[-1]), cast(QuantType, quant_type), block_size)
    return _forward(x, weight, bias, lora_a, lora_b, scaling, p, seed)


@_lora_linear.register_fake
def _(
    x: Tensor, packed: Tensor, absmax: Tensor, nested: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor,
    seed: Tensor | None, out_features: int, quant_type: str, block_size: int, scaling: float, p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = x.reshape(-1, x.shape[-1]).shape[0]
    return x.new_empty(*x.shape[:-1], out_features), x.new_empty(rows, lora_a.shape[0])


@torch.library.custom_op("lightning_qlora::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    grad: Tensor, x: Tensor, xa: Tensor, packed: Tensor, absmax: Tensor, nested: Tensor, lora_a: Tensor,
    lora_b: Tensor, seed: Tensor | None, quant_type: str, block_size: int, scaling: float, p: float, needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (grad.shape[-1], x.shape[-1])
    weight = PackedBytes(packed, absmax, nested, shape, cast(QuantType, quant_type), block_size)
    grad_x, grad_a, grad_b = _backward(grad, x, xa, weight, lora_a, lora_b, scaling, p, seed, needs_x)
    return x.new_empty(0) if grad_x is None else grad_x, grad_a, grad_b


@_lora_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, xa: Tensor, packed: Tensor, absmax: Tensor, nested: Tensor, lora_a: Tensor,
    lora_b: Tensor, seed: Tensor | None, quant_type: str, block_size: int, scaling: float, p: float, needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape if needs_x else 0), lora_a.new_empty(lora_a.shape), lora_b.new_empty(lora_b.shape)


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, packed, absmax, nested, bias, lora_a, lora_b, seed, _, quant_type, block_size, scaling, p = inputs
    ctx.mark_non_differentiable(output[1])
    # All but x and xa are parameters, held anyway: neither the decoded weight nor a dropout mask is kept.
    ctx.save_for_backward(x, output[1], packed, absmax, nested, lora_a, lora_b, seed)
    ctx.choices = quant_type, block_size, scaling, p
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_of_op(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, xa, packed, absmax, nested, lora_a, lora_b, seed = ctx.saved_tensors
    needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    grad_x, grad_a, grad_b = torch.ops.lightning_qlora.lora_linear_backward(
        grad, x, xa, packed, absmax, nested, lora_a, lora_b, seed, *ctx.choices, needs_x
    )
    grad_bias = _grad_bias(grad, ctx.bias_dtype) if needs_bias else None
    return grad_x if needs_x else None, None, None, None, grad_bias, grad_a, grad_b, *[None] * 6


_lora_linear.register_autograd(_backward_of_op, setup_context=_save_for_op)


class _LoraLinear(torch.autograd.Function):
    """The same op without torch.library, which costs more than all the arithmetic of a small layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: PackedBytes, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float,
        p: float, seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        y, xa = _forward(x, weight, bias, lora_a, lora_b, scaling, p, seed)
        ctx.save_for_backward(x, xa, lora_a, lora_b)
        ctx.choices = weight, scaling, p, seed, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, lora_a, lora_b = ctx.saved_tensors
        weight, scaling, p, seed, bias_dtype = ctx.choices
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        grad_x, grad_a, grad_b = _backward(grad, x, xa, weight, lora_a, lora_b, scaling, p, seed, needs_x)
        return grad_x, None, _grad_bias(grad, bias_dtype) if needs_bias else None, grad_a, grad_b, None, None, None


def _is_plain(x: Tensor, lora_a: Tensor) -> bool:
    """Whether nobody watches the ops: no compiler, no tracer, no subclass, no dispatch mode, no functorch transform."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
        or (type(lora_a) is not torch.nn.Parameter and type(lora_a) is not Tensor)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


def _refuse_transforms(*tensors: Tensor | None) -> None:
    """Of an op without a formula for it torch.func.jvp makes zeros, in silence; torch.func.grad's error misleads."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    use = "Use backward(), torch.autograd.grad or torch.autograd.functional.vjp."
    if any(
        layer.key() == torch._C._functorch.TransformType.Jvp for layer in torch._C._functorch.get_interpreter_stack()
    ):
        raise NotImplementedError(
            "torch.func.jvp, jacfwd and hessian need forward-mode derivatives, which 4-bit layers do not have. " + use
        )
    if torch.is_grad_enabled() and any(tensor is not None and _is_differentiated(tensor) for tensor in tensors):
        raise NotImplementedError("torch.func.grad, vjp and jacrev do not reach through 4-bit layers. " + use)


def _is_differentiated(tensor: Tensor) -> bool:
    """Whether torch.func.grad or one of its kin follows a tensor, inside of vmap or around it."""
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return torch._C._functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad


def _forward(
    x: Tensor, weight: PackedBytes, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float, p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[..., in] -> [..., out] and drop(x) A^T, [m, r]."""
    if _autocast_meddles(x):
        with torch.autocast(x.device.type, enabled=False):
            return _forward(x, weight, bias, lora_a, lora_b, scaling, p, seed)
    _check_linear(x, lora_a, lora_b, weight, bias)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y, xa = backend(x.device).linear(rows, weight, bias, lora_a, lora_b, scaling, p, seed)
    # Not `view`, as in torch's own linear: a view made in an autograd.Function can't be changed in place later.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], weight.shape[0]]), xa


def _backward(
    grad: Tensor, x: Tensor, xa: Tensor, weight: PackedBytes, lora_a: Tensor, lora_b: Tensor, scaling: float, p: float,
    seed: Tensor | None, needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, shaped as x, of A and of B."""
    if _autocast_meddles(x):
        with torch.autocast(x.device.type, enabled=False):
            return _backward(grad, x, xa, weight, lora_a, lora_b, scaling, p, seed, needs_x)
    out_features, in_features = weight.shape
    rows, grad_rows = (x, grad) if x.dim() == 2 else (x.reshape(-1, in_features), grad.reshape(-1, out_features))
    grad_x, grad_a, grad_b = backend(x.device).linear_backward(
        grad_rows, rows, xa, weight, lora_a, lora_b, scaling, p, seed, needs_x
    )
    return grad_x if grad_x is None or x.dim() == 2 else grad_x.view(x.shape), grad_a, grad_b


def _autocast_meddles(x: Tensor) -> bool:
    """Whether autocast would make torch's products of another type than x, which the loops and kernels write to."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is not x.dtype


def _grad_bias(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(dtype)


def _check_linear(x: Tensor, lora_a: Tensor, lora_b: Tensor, weight: PackedBytes, bias: Tensor | None) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"x: must be float32, bfloat16 or float16, not {x.dtype}.")
    (out_features, in_features), r = weight.shape, len(lora_a)
    matches = x.shape[-1] == in_features and tuple(lora_a.shape) == (r, in_features)
    matches = matches and tuple(lora_b.shape) == (out_features, r)
    if not matches or (bias is not None and tuple(bias.shape) != (out_features,)):
        shapes = [tuple(lora_a.shape), tuple(lora_b.shape), None if bias is None else tuple(bias.shape)]
        raise ValueError(
            f"lora_linear: a weight [{out_features}, {in_features}] and x {list(x.shape)} need A [r, {in_features}], "
            f"B [{out_features}, r] and bias [{out_features}]; got {shapes}."
        )
    check_bytes(weight)
