import math

import pytest
import torch

from lightning_qlora.kernels.reference import (
    AdamWStep,
    adamw8bit_step,
    adamw_step,
    dequantize_state,
    quantize_state,
)
from lightning_qlora.quantization.codebooks import dynamic_map

SCALARS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def float64_adamw(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay, bounded=False):
    """The formulas, written apart from the code under test."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    root = torch.maximum(v_hat.sqrt(), m_hat.abs()) if bounded else v_hat.sqrt()
    return p - lr * weight_decay * p - lr * m_hat / (root + eps), m, v


def nearest_float64(x, levels):
    """The nearest level of each block of 256, its largest magnitude being one."""
    out = torch.empty_like(x)
    scales = []
    for start in range(0, x.numel(), 256):
        block = x[start : start + 256]
        scale = block.abs().max()
        distances = (block[:, None] / scale - levels.double()[None, :]).abs()
        out[start : start + 256] = levels.double()[distances.argmin(1)] * scale
        scales.append(scale)
    return out, torch.stack(scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_32bit_step_agrees_with_float64(dtype):
    torch.manual_seed(0)
    p = torch.randn(100, 7).to(dtype)
    m = torch.zeros(100, 7)
    v = torch.zeros(100, 7)
    p64 = p.double()
    m64 = m.double()
    v64 = v.double()
    for step in range(1, 6):
        g = torch.randn(100, 7).to(dtype)
        adamw_step([p], [g], [m], [v], AdamWStep(step, **SCALARS))
        p64, m64, v64 = float64_adamw(p64, g.double(), m64, v64, step, **SCALARS)
    assert torch.allclose(p.double(), p64, rtol=0, atol=1e-6 if dtype == torch.float32 else 5e-2)
    assert torch.allclose(m.double(), m64, atol=1e-6)
    assert torch.allclose(v.double(), v64, atol=1e-6)


def test_32bit_step_agrees_with_torch():
    torch.manual_seed(0)
    ours = torch.randn(64, 64)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    m = torch.zeros(64, 64)
    v = torch.zeros(64, 64)
    for step in range(1, 11):
        theirs.grad = torch.randn(64, 64)
        adamw_step([ours], [theirs.grad], [m], [v], AdamWStep(step, **SCALARS))
        optimizer.step()
    assert torch.allclose(ours, theirs.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("numel", [256, 4096, 4097, 5000])
def test_8bit_step_agrees_with_a_float64_model(numel):
    torch.manual_seed(0)
    p = torch.randn(numel)
    blocks = math.ceil(numel / 256)
    m, v = ((torch.zeros(numel, dtype=torch.uint8), torch.zeros(blocks)) for _ in range(2))
    p64 = p.double()
    m64 = torch.zeros(numel).double()
    v64 = torch.zeros(numel).double()
    for step in range(1, 6):
        g = torch.randn(numel)
        adamw8bit_step([p], [g], *(([codes], [scales]) for codes, scales in (m, v)), AdamWStep(step, **SCALARS))
        p64, m64, v64 = float64_adamw(p64, g.double(), m64, v64, step, **SCALARS, bounded=True)
        m64, m_scales = nearest_float64(m64, dynamic_map(True))
        v64, v_scales = nearest_float64(v64, dynamic_map(False))
        # fp32 may take the other neighbour where a value is on the border between two levels
        for codes, scales, signed, expected in ((*m, True, m64), (*v, False, v64)):
            off = (dequantize_state(codes, scales, signed).double() - expected).abs() > 1e-6 * expected.abs().max()
            assert off.float().mean() < 2e-3
        assert torch.allclose(m[1].double(), m_scales, rtol=1e-5)
        assert torch.allclose(v[1].double(), v_scales, rtol=1e-5)
        assert (p.double() - p64).abs().max() < 5e-3 * step
        assert (p.double() - p64).abs().median() < 1e-6
        m64 = dequantize_state(*m, True).double()
        v64 = dequantize_state(*v, False).double()


@pytest.mark.parametrize("signed", [True, False])
def test_levels_survive_a_round_trip(signed):
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)
    absmax = torch.tensor([3.0, 1e-5])
    values = dequantize_state(codes, absmax, signed)
    again = torch.empty_like(codes)
    scales = torch.empty(2)
    quantize_state(values, again, scales, signed)
    assert torch.equal(again, codes)
    assert torch.allclose(scales, absmax)


def test_zero_blocks_stay_zero():
    codes = torch.zeros(512, dtype=torch.uint8)
    absmax = torch.zeros(2)
    assert not dequantize_state(codes, absmax, True).any()
    quantize_state(torch.zeros(512), codes, absmax, True)
    assert not dequantize_state(codes, absmax, True).any()


def test_codes_and_scales_are_those_of_bitsandbytes_map_and_rounding():
    """As its portable backend (backends/default/ops.py, quantize_blockwise); its C code for CPUs rounds on a grid."""
    functional = pytest.importorskip("bitsandbytes.functional")
    values = torch.randn(5000)
    codes = torch.empty(5000, dtype=torch.uint8)
    absmax = torch.empty(20)
    for signed in (True, False):
        quantize_state(values if signed else values.abs(), codes, absmax, signed)
        levels = functional.create_dynamic_map(signed=signed)
        blocks = (values if signed else values.abs()).split(256)
        scales = torch.stack([block.abs().max() for block in blocks])
        pairs = zip(blocks, scales, strict=True)
        scaled = torch.cat([block * (1.0 / s) if len(block) == 256 else block / s for block, s in pairs])
        assert torch.equal(codes, torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2).to(torch.uint8))
        assert torch.equal(absmax, scales)
