"""Where an adapter starts, and the 4-bit base that belongs to the start.

    default, gaussian   A random, B = 0:  the model is the quantized one              base Q = quantize(W)
    loftq               s B A = SVD_r(W - Q), repeated                                 base Q = quantize(W - s B A)
    pissa               s B A = SVD_r(W), repeated                                     base Q = quantize(W - s B A)
    calibrated          s B A = SVD_r((W - Q) diag(d)) diag(1 / d), d = input sizes    base Q = quantize(W)

LoftQ: Li et al. 2023, algorithm 1. PiSSA: Meng et al. 2024, section 3, and for more than one iteration section 4, with
scales that leave the least error (`clipping`).
"""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels import ops
from lightning_qlora.quantize.packed import PackedWeight
from lightning_qlora.starts import low_rank, unwritten
from lightning_qlora.starts.clipping import quantize_clipped

FLOOR = 1e-2  # of the mean input size: what the smallest channels count as, so that dividing by it stays harmless


Quantize = Callable[[Tensor, QLoRAConfig], PackedWeight]


class Start(NamedTuple):
    """A layer before its first step: the 4-bit base [out, in], A [r, in] and B [out, r] in fp32."""

    base: PackedWeight
    lora_a: Tensor
    lora_b: Tensor


def start(weight: Tensor, config: QLoRAConfig, name: str) -> Start:
    """The start of a layer from its dense weight [out, in] alone, computed where the weight is.

    A "calibrated" adapter starts as "default" here; `calibrated` follows when the layer's inputs are known.
    """
    if config.start == "pissa":
        return _pissa(weight, config, name)
    if config.start == "loftq":
        return _loftq(weight, config, name)
    if config.start == "calibrated":
        _rank(weight, config, name)  # now, not when the first batch comes
    lora_a, lora_b = random_adapter(weight.shape[1], weight.shape[0], config, name)
    return Start(_quantize(weight, config), lora_a, lora_b)


def moves_base(config: QLoRAConfig) -> bool:
    """Whether the base is another than the quantized weight: the last bits of an SVD then decide some of its codes."""
    return config.start == "pissa" or (config.start == "loftq" and config.loftq_iterations > 1)


def random_adapter(in_features: int, out_features: int, config: QLoRAConfig, name: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], fp32, on the CPU: A random and B zero leave the model unchanged.

    "default": A uniform in +-1 / sqrt(in), which is PEFT's kaiming_uniform_(a=sqrt(5)); "gaussian": A normal with
    deviation 1 / r.
    """
    generator, r = torch.Generator().manual_seed(seed_of_layer(name)), config.rank_of(name)
    lora_a = torch.empty(r, in_features, dtype=torch.float32)
    if config.start == "gaussian":
        lora_a.normal_(std=1 / r, generator=generator)
    else:
        lora_a.uniform_(-1 / math.sqrt(in_features), 1 / math.sqrt(in_features), generator=generator)
    return lora_a, unwritten.zeros(out_features, r)


def calibrated(
    weight: Tensor, base: PackedWeight, input_rms: Tensor, config: QLoRAConfig, name: str
) -> tuple[Tensor, Tensor]:
    """A and B whose product best replaces what quantization took, on inputs of the layer's own sizes.

    The minimum over B A of E_x ||(W - Q - s B A) x||^2, with E[x x^T] taken as diag(d^2).

    Args:
        weight: The dense weight [out, in].
        base: Its 4-bit value.
        input_rms: d, root mean square of every input channel, [in].
        config: The arguments of the conversion.
        name: The layer's name.
    """
    size = input_rms.to(weight.device, torch.float32)
    size = (size / size.square().mean().sqrt()).clamp_min(FLOOR)
    error = (weight.float() - base.dequantize(torch.float32)) * size
    lora_a, lora_b = _adapter(low_rank.exact(error, _rank(weight, config, name)), config, name)
    return lora_a / size, lora_b


def seed_of_layer(name: str) -> int:
    """A seed from a layer's name and `seed_everything`'s seed: the same on every rank, whatever was drawn before."""
    key = f"{os.environ.get('PL_GLOBAL_SEED', 0)}/{name}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")


def _loftq(weight: Tensor, config: QLoRAConfig, name: str) -> Start:
    return _alternate(weight, weight, config.loftq_iterations, _quantize, config, name)


def _pissa(weight: Tensor, config: QLoRAConfig, name: str) -> Start:
    dense, r = weight.float(), _rank(weight, config, name)
    if config.pissa_iterations is None:
        factors = low_rank.exact(dense, r)
    else:
        factors = low_rank.sketched(dense, r, config.pissa_iterations, seed_of_layer(name))
    lora_a, lora_b = _adapter(factors, config, name)
    rest = dense - config.scaling_of(name) * (lora_b @ lora_a)
    if config.loftq_iterations > 1:
        return _alternate(weight, rest, config.loftq_iterations - 1, quantize_clipped, config, name)
    return Start(replace(_quantize(rest, config), dtype=weight.dtype), lora_a, lora_b)


def _alternate(
    weight: Tensor, rest: Tensor, iterations: int, quantize: Quantize, config: QLoRAConfig, name: str
) -> Start:
    """In turns: the base is what the adapter leaves (`rest` at first) in 4 bits, the adapter what the base leaves."""
    dense, r = weight.float(), _rank(weight, config, name)
    for _ in range(iterations):
        base = quantize(rest, config)
        lora_a, lora_b = _adapter(low_rank.exact(dense - base.dequantize(torch.float32), r), config, name)
        rest = dense - config.scaling_of(name) * (lora_b @ lora_a)
    return Start(replace(base, dtype=weight.dtype), lora_a, lora_b)


def _adapter(factors: low_rank.Factors, config: QLoRAConfig, name: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with s B A = u diag(sigma) v^T, the singular values shared equally between them."""
    u, sigma, v = factors
    root = (sigma / config.scaling_of(name)).sqrt()
    random_a, _ = random_adapter(v.shape[0], u.shape[0], config, name)
    # Where there is nothing to replace, A = B = 0 would have no gradient for ever: there A starts as by default.
    nothing = (sigma <= torch.finfo(torch.float32).eps * sigma.max()).unsqueeze(1)
    return torch.where(nothing, random_a.to(v), (v * root).T), (u * root).contiguous()


def _quantize(weight: Tensor, config: QLoRAConfig) -> PackedWeight:
    return ops.quantize(weight, config.quant_type, config.block_size, config.double_quant)


def _rank(weight: Tensor, config: QLoRAConfig, name: str) -> int:
    r = config.rank_of(name)
    if r > min(weight.shape):
        raise ValueError(
            f"r={r}: a {weight.shape[0]}x{weight.shape[1]} weight has only {min(weight.shape)} singular values, which "
            f"init_lora_weights={config.init_lora_weights!r} starts from. Use a smaller r (rank_pattern sets that of "
            "single layers) or init_lora_weights='default'."
        )
    return r
