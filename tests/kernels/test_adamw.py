import pytest
import torch

from lightning_qlora.kernels import adamw
from lightning_qlora.kernels.adamw import AdamWStep, dequantize_state, quantize_state
from lightning_qlora.quantization.codebooks import dynamic_map

SCALARS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


SHAPES = [(20, 70), (300,), (1,), (256,), (17, 33), (4097,)]


def draw(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_32bit_steps_agree_with_torch(dtype):
    """Which computes in fp64 here, from the same numbers."""
    ours, m, v = draw(0, dtype), *([torch.zeros(shape) for shape in SHAPES] for _ in range(2))
    theirs = [torch.nn.Parameter(param.double()) for param in ours]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for step in range(1, 6):
        grads = draw(step, dtype)
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.double()
        adamw.adamw_step(ours, grads, m, v, AdamWStep(step, **SCALARS))
        optimizer.step()
    for param, expected, *moments in zip(ours, theirs, m, v, strict=True):
        torch.testing.assert_close(
            param.double(), expected.detach(), rtol=0, atol=1e-6 if dtype is torch.float32 else 5e-2
        )
        for moment, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
            torch.testing.assert_close(moment.double(), optimizer.state[expected][name], rtol=0, atol=1e-6)


def scaled64(values):
    """Float64 values divided by the scale of their block, and the scales."""
    blocks = torch.nn.functional.pad(values.view(-1), (0, -values.numel() % 256)).view(-1, 256)
    scales = blocks.abs().amax(1)
    return (blocks / scales[:, None]).view(-1)[: values.numel()].view(values.shape), scales


def check_8bit_steps(update):
    """Every code and parameter is that of the formula in fp64; of two levels fp32 may take either at their border."""
    ours = draw(0)
    state = [([torch.zeros(shape, dtype=torch.uint8) for shape in SHAPES], []) for _ in range(2)]
    for codes, scales in state:
        scales += [torch.zeros(-(-code.numel() // 256)) for code in codes]
    undecided = 0
    for step in range(1, 8):
        grads = draw(step)
        before = [p.double() for p in ours]
        moments = [
            [dequantize_state(*each, signed).double() for each in zip(*moment, strict=True)]
            for moment, signed in zip(state, (True, False), strict=True)
        ]
        update(ours, grads, *state, AdamWStep(step, **SCALARS))
        for i, g in enumerate(grads):
            m = 0.9 * moments[0][i] + 0.1 * g.double()
            v = 0.999 * moments[1][i] + 0.001 * g.double() ** 2
            m_hat = m / (1 - 0.9**step)
            v_hat = v / (1 - 0.999**step)
            moved = m_hat / (torch.maximum(v_hat.sqrt(), m_hat.abs()) + 1e-8)
            torch.testing.assert_close(ours[i].double(), before[i] * (1 - 1e-3) - 1e-2 * moved, rtol=1e-5, atol=1e-6)
            for (codes, scales), value, signed in zip(state, (m, v), (True, False), strict=True):
                scaled, expected_scales = scaled64(value)
                bounds = ((dynamic_map(signed)[:-1] + dynamic_map(signed)[1:]) / 2).double()
                off = codes[i] != torch.bucketize(scaled, bounds)
                assert ((scaled[off][:, None] - bounds).abs().amin(1) < 1e-6).all()
                undecided += int(off.sum())
                torch.testing.assert_close(scales[i].double(), expected_scales, rtol=1e-6, atol=1e-7)
    assert undecided < 3  # of 90,000 codes


def test_8bit_steps_agree_with_the_formula_in_float64():
    check_8bit_steps(adamw.adamw8bit_step)


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
