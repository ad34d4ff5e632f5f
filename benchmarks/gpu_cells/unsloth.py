"""A peer: a 4-bit linear layer with an adapter in the style of Unsloth, on the C functions of bitsandbytes.

As in Unsloth (unsloth/kernels/utils.py `fast_dequantize`, fast_lora.py `LoRA_W`), three launches decode the weight into
one buffer that all layers share, one autograd.Function computes base and adapter and saves only x, and dX is
accumulated in place. There is no dropout. Unsloth's fused SwiGLU, norms, rotary embedding and loss are not included.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers

_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _buffer(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    buffer = _buffers.get((device, dtype))
    if buffer is None or buffer.numel() < numel:
        buffer = _buffers[device, dtype] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel]


def decode(packed: Tensor, state: Any) -> Tensor:
    """Decode a bitsandbytes weight to bf16 [out, in]; the result is valid until the next call."""
    from bitsandbytes import functional

    weight = _buffer(state.shape.numel(), torch.bfloat16, packed.device).view(state.shape)
    if not packed.is_cuda:
        return weight.copy_(functional.dequantize_4bit(packed, state))
    from bitsandbytes.cextension import lib

    stream = ctypes.c_void_p(torch.cuda.current_stream(packed.device).cuda_stream)
    absmax = _buffer(state.absmax.numel(), torch.float32, packed.device)
    pointer = functional.get_ptr
    number = ctypes.c_int
    lib.cdequantize_blockwise_fp32(
        pointer(state.state2.code),
        pointer(state.absmax),
        pointer(state.state2.absmax),
        pointer(absmax),
        number(state.state2.blocksize),
        number(absmax.numel()),
        stream,
    )
    absmax += state.offset
    lib.cdequantize_blockwise_bf16_nf4(
        None, pointer(packed), pointer(absmax), pointer(weight), number(state.blocksize), number(weight.numel()), stream
    )
    return weight


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, state: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ decode(packed, state).T
        y.addmm_(rows @ a.to(x.dtype).T, b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x, a, b)
        ctx.rest = packed, state, scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, a, b), (packed, state, scaling) = ctx.saved_tensors, ctx.rest
        rows = x.reshape(-1, x.shape[-1])
        grad_rows = grad.reshape(-1, grad.shape[-1])
        a16 = a.to(x.dtype)
        b16 = b.to(x.dtype)
        grad_xa = grad_rows @ b16
        grad_a = (grad_xa.T @ rows).mul_(scaling).to(a.dtype)
        grad_b = (grad_rows.T @ (rows @ a16.T)).mul_(scaling).to(b.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, None, grad_a, grad_b, None
        grad_x = grad_rows @ decode(packed, state)
        grad_x.addmm_(grad_xa, a16, alpha=scaling)
        return grad_x.view(x.shape), None, None, grad_a, grad_b, None


class UnslothLinear(nn.Module):
    """y = x W^T + s (x A^T) B^T; W in bitsandbytes' NF4 with double quantization, A and B in fp32, computed in bf16."""

    def __init__(self, layer: nn.Linear, r: int, scaling: float) -> None:
        super().__init__()
        linear = peers.bnb_linear(layer)
        self.packed = linear.weight.data
        self.state = linear.weight.quant_state
        self.scaling = scaling
        device = self.packed.device
        self.lora_A = nn.Parameter(torch.randn(r, layer.in_features, device=device) * layer.in_features**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, r, device=device))
        self._check(linear)

    def _check(self, made: Any) -> None:
        from bitsandbytes import functional

        if not torch.equal(decode(self.packed, self.state), functional.dequantize_4bit(self.packed, self.state)):
            raise RuntimeError("The C functions of bitsandbytes do not decode as its Python functions do.")

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _LoraLinear.apply(
                x.to(torch.bfloat16), self.packed, self.state, self.lora_A, self.lora_B, self.scaling
            )
        return y
