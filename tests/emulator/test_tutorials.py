"""Triton's tutorials against torch: the interpreter knows what Triton emits, not only what our kernels need."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import triton

from tests.emulator import amd
from tests.emulator import tutorial_kernels as tutorials
from tests.emulator.driver import emulated
from tests.emulator.memory import Fault
from tests.toys import needs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # products of fp32 factors are in TF32
OTHERS = [pytest.param(target, marks=pytest.mark.slow) for target in ("sm_75", "sm_90", "sm_120")]
TARGETS = ["sm_80", *OTHERS, *amd.targets()]
pytestmark = [
    needs("triton", "3.9", "the emulator knows its PTX"),
    pytest.mark.parametrize("target", TARGETS),
    pytest.mark.parametrize("dtype", DTYPES),
    pytest.mark.filterwarnings("ignore:tl.where", "ignore:TRITON_DEFAULT_FP_FUSION"),
]


@pytest.fixture(autouse=True)
def _emulated(target, dtype):
    if target == "sm_75" and dtype == torch.bfloat16:
        pytest.skip("Turing has no instructions for bf16")
    with emulated(target):
        yield


def assert_near(ours, theirs, dtype, factor=1):
    assert (ours.double() - theirs.double()).abs().max() <= factor * TOLERANCE[dtype] * theirs.abs().max()


def test_vector_addition(dtype):
    x, y = torch.randn(2, 9843).to(dtype)
    out = torch.empty_like(x)
    tutorials.add_kernel[lambda meta: (triton.cdiv(9843, meta["BLOCK_SIZE"]),)](x, y, out, 9843, BLOCK_SIZE=1024)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("num_warps", [4, 16])
def test_softmax(dtype, num_warps):
    x = torch.randn(37, 781).to(dtype)
    out = torch.empty_like(x)
    tutorials.softmax_kernel[(8, 1, 1)](out, x, 781, 781, 37, 781, 1024, 4, num_warps=num_warps)
    assert_near(out, x.float().softmax(1), dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "n", "k", "num_warps", "num_stages"), [(64, 128, 32, 4, 4), (16, 32, 32, 2, 3)])
def test_matmul(target, dtype, m, n, k, num_warps, num_stages, transposed):
    if target == "sm_75" and m > 16:
        pytest.skip("without tensor cores large tiles take minutes to compile")
    num_stages = 2 if target in amd.TARGETS else num_stages  # 64 KiB of shared memory
    a, b = torch.randn(130, 150).to(dtype), torch.randn(150, 200).to(dtype)
    b = b.T.contiguous().T if transposed else b
    c = torch.empty(130, 200, dtype=dtype)

    def grid(meta):
        return (triton.cdiv(130, meta["BLOCK_SIZE_M"]) * triton.cdiv(200, meta["BLOCK_SIZE_N"]),)

    tutorials.matmul_kernel[grid](
        a,
        b,
        c,
        130,
        200,
        150,
        *a.stride(),
        *b.stride(),
        *c.stride(),
        m,
        n,
        k,
        8,
        ACTIVATION="leaky_relu",
        num_warps=num_warps,
        num_stages=num_stages,
    )
    assert_near(c, F.leaky_relu(a.float() @ b.float()), dtype)


def test_dropout(dtype):
    """A mask that is given, and one from a seed: half of the values, the same for the same seed."""
    x, keep = torch.randn(1000).to(dtype), torch.rand(1000) > 0.5
    outs = [torch.empty_like(x) for _ in range(4)]
    tutorials._dropout[(1,)](x, keep, outs[0], 1000, 0.5, BLOCK_SIZE=1024)
    assert torch.equal(outs[0], torch.where(keep, x * 2, 0))
    for out, seed in zip(outs[1:], (123, 123, 512), strict=True):
        tutorials._seeded_dropout[(1,)](x, out, 1000, 0.5, seed, BLOCK_SIZE=1024)
        assert torch.equal(out[out != 0], 2 * x[out != 0])
        assert 420 < (out == 0).sum() < 580
    assert torch.equal(outs[1], outs[2]) and not torch.equal(outs[1], outs[3])


def test_layer_norm(target, dtype):
    """Forward, and backward with programs that wait for each other at locks.

    That races on CDNA, as sums that programs share do: the wave that unlocks did not wait for the stores of the others.
    """
    rows, width, groups = 24, 1000, 4
    x, grad = torch.randn(2, rows, width).to(dtype)
    w, b = torch.rand(2, width).to(dtype)
    y, grad_x, (mean, rstd) = torch.empty_like(x), torch.empty_like(x), torch.empty(2, rows)
    tutorials._layer_norm_fwd_fused[(rows,)](x, y, w, b, mean, rstd, width, width, 1e-5, BLOCK_SIZE=1024, num_warps=4)
    parameters = [tensor.float().requires_grad_() for tensor in (x, w, b)]
    expected = F.layer_norm(parameters[0], (width,), *parameters[1:], 1e-5)
    assert_near(y, expected.detach(), dtype)
    expected.backward(grad.float())
    locks, (part_w, part_b) = torch.zeros(2 * groups, dtype=torch.int32), torch.zeros(2, groups, width).to(dtype)
    grad_w, grad_b = torch.empty(2, width).to(dtype)
    races = pytest.raises(Fault, match="its warp has not waited for the store")
    with races if target == "gfx942" else nullcontext():
        tutorials._layer_norm_bwd_dx_fused[(rows,)](
            grad_x,
            grad,
            part_w,
            part_b,
            x,
            w,
            mean,
            rstd,
            locks,
            width,
            width,
            BLOCK_SIZE_N=1024,
            GROUP_SIZE_M=groups,
            num_warps=4,
        )
    if target == "gfx942":
        return
    tutorials._layer_norm_bwd_dwdb[lambda meta: (triton.cdiv(width, meta["BLOCK_SIZE_N"]),)](
        part_w, part_b, grad_w, grad_b, groups, width, BLOCK_SIZE_M=32, BLOCK_SIZE_N=128
    )
    assert_near(grad_x, parameters[0].grad, dtype)
    assert_near(grad_w, parameters[1].grad, dtype, 5)
    assert_near(grad_b, parameters[2].grad, dtype, 5)
