"""The steps of 8-bit AdamW in torch: the specification that all backends are tested against, and its cases.

`triton/adamw_kernel.py` has the same for a GPU.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.quantization.blockwise import block_absmax, normalize
from lightning_qlora.quantization.codebooks import dynamic_map

STATE_BLOCK_SIZE = 256  # elements per scale, as in bitsandbytes
LARGEST = torch.finfo(torch.float32).max  # number in fp32


Moment = tuple[list[Tensor], list[Tensor]]  # in 8 bits: the codes of all tensors, and their scales


@dataclass(frozen=True)
class AdamWStep:
    """The scalars of one step, as in the formula of `adamw_step`."""

    step: int  # t, from 1
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float  # wd


@torch.no_grad()
def adamw_step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], scalars: AdamWStep
) -> None:
    """One step with fp32 state, in place. Parameters and gradients are fp32, bf16 or fp16; computed in fp32.

    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    p = p (1 - lr wd) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    """
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        _update(param, grad, exp_avg, exp_avg_sq, scalars)


@torch.no_grad()
def adamw8bit_step(
    params: list[Tensor], grads: list[Tensor], exp_avg: Moment, exp_avg_sq: Moment, scalars: AdamWStep
) -> None:
    """One step with 8-bit state, in place.

    m and v are codes of the 256 dynamic levels (signed for m, unsigned for v) with one scale per 256 elements. They are
    decoded, updated in fp32 and quantized again, as in bitsandbytes' 8-bit AdamW (backends/triton/kernels_optim.py;
    Dettmers et al. 2022, "8-bit optimizers via block-wise quantization"). Codes are uint8 with the shape of the
    parameter, which has n elements; absmaxes are fp32 [ceil(n / 256)]. Codes 0 with absmax 0 are the initial state (all
    moments zero). One thing differs from bitsandbytes, the denominator:

    m_hat = m / (1 - beta1^t);  v_hat = v / (1 - beta2^t)
    p = p (1 - lr wd) - lr * m_hat / (max(sqrt(v_hat), |m_hat|) + eps)

    so that no step is longer than lr. v is the square of a gradient: an element whose gradients are below 1 / 2500 of
    the largest in its block gets code 0. m, which is not a square, still has a value there, and m / (sqrt(0) + eps)
    would be thousands of learning rates. Where v has a value, the maximum changes nothing in the first step and little
    later.
    """
    tensors = zip(params, grads, *exp_avg, *exp_avg_sq, strict=True)
    for param, grad, m_codes, m_absmax, v_codes, v_absmax in tensors:
        m = dequantize_state(m_codes, m_absmax, signed=True)
        v = dequantize_state(v_codes, v_absmax, signed=False)
        _update(param, grad, m, v, scalars, bounded=True)
        quantize_state(m, m_codes, m_absmax, signed=True)
        quantize_state(v, v_codes, v_absmax, signed=False)


def dequantize_state(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """level[code] * scale of the block: uint8 [...] and fp32 [blocks] -> fp32 [...]."""
    scales = absmax.repeat_interleave(STATE_BLOCK_SIZE)[: codes.numel()]
    return dynamic_map(signed, device=codes.device)[codes.int()] * scales.view(codes.shape)


def quantize_state(values: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    """Quantize fp32 values: write the nearest codes into `codes` and the scales of the blocks into `absmax`."""
    flat = values.reshape(-1)
    absmax.copy_(block_absmax(flat, STATE_BLOCK_SIZE))
    levels = dynamic_map(signed, device=values.device)
    nearest = torch.bucketize(normalize(flat, absmax, STATE_BLOCK_SIZE), (levels[:-1] + levels[1:]) / 2, out_int32=True)
    codes.copy_(nearest.view(codes.shape))


def _update(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, scalars: AdamWStep, bounded: bool = False) -> None:
    g = grad.float()
    p = param.float()
    m.mul_(scalars.beta1).add_(g, alpha=1 - scalars.beta1)
    v.mul_(scalars.beta2).addcmul_(g, g, value=1 - scalars.beta2)
    correction = 1 - scalars.beta1**scalars.step
    if bounded:
        v.clamp_(max=LARGEST)  # an infinite scale would make NaN of all elements of the block
    denominator = v.sqrt() / math.sqrt(1 - scalars.beta2**scalars.step)
    if bounded:
        denominator = torch.maximum(denominator, m.abs() / correction)
    denominator.add_(scalars.eps)
    if scalars.weight_decay:
        p = p * (1 - scalars.lr * scalars.weight_decay)
    param.copy_(p.addcdiv_(m, denominator, value=-scalars.lr / correction))


SIZES = ((300,), (1,), (20, 70)), ((512,), (16, 64)), ((512,), (16, 64))  # of parameters, for each type
TYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP = AdamWStep(3, lr=0.5, beta1=0.9, beta2=0.99, eps=1e-3, weight_decay=0.1)


def _cases(in_8_bits: bool, normal: Callable[..., Tensor], generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    """Arguments with random values on the CPU; see `verify.cases`."""

    def codes(like: Tensor) -> Tensor:
        return torch.randint(256, like.shape, generator=generator, dtype=torch.uint8, device="cpu")

    for sizes, dtype in zip(SIZES, TYPES, strict=True):
        params, grads = ([normal(*size, dtype=dtype) for size in sizes] for _ in range(2))
        m = [normal(*size) for size in sizes]
        v = [normal(*size).square() for size in sizes]
        scales = [normal(-(-param.numel() // STATE_BLOCK_SIZE)).abs() for param in params]
        if in_8_bits:
            yield params, grads, ([*map(codes, m)], scales), ([*map(codes, v)], scales), STEP
        else:
            yield params, grads, m, v, STEP


ADAMW = {
    "adamw_step": (adamw_step, partial(_cases, False)),
    "adamw8bit_step": (adamw8bit_step, partial(_cases, True)),
}
