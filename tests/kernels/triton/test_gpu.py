"""Every op on the card against the reference on the CPU: `pytest -m gpu tests/kernels/triton`."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
import torch

from lightning_qlora.kernels import adamw, ops, reference
from lightning_qlora.quantize.packed import PackedBytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPES = [(4096, 4096), (1000, 4096), (257, 1001), (3, 5)]


def to_card(weight: PackedBytes) -> PackedBytes:
    return PackedBytes(*(part.cuda() for part in weight[:3]), *weight[3:])


def assert_near(ours, theirs, dtype):
    assert (ours.cpu() - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_and_dequantize_equal_the_reference_bit_for_bit(quant_type, double_quant, shape):
    weight = torch.randn(shape) * 0.02
    for block_size in (64, 4096):
        expected = reference.quantize(weight, quant_type, block_size, double_quant)
        ours = ops.quantize(weight.cuda(), quant_type, block_size, double_quant).to_bytes()
        for mine, yours in zip(ours[:3], expected[:3], strict=True):
            assert torch.equal(mine.cpu().view(-1), yours.view(-1))
        for dtype in DTYPES:
            assert torch.equal(ops.dequantize(to_card(expected), dtype).cpu(), reference.dequantize(expected, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16, 32, 100, 1024])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_layer_forward_and_backward(dtype, rows, p):
    weight = reference.quantize(torch.randn(1000, 512) / 22, "nf4", 64, True)
    x, grad, bias = torch.randn(rows, 512).to(dtype), torch.randn(rows, 1000).to(dtype), torch.randn(1000)
    a, b = torch.randn(16, 512) / 22, torch.randn(1000, 16) / 4
    seed = torch.tensor([2**40 + 3]) if p else None
    y, xa = reference.linear(x, weight, bias, a, b, 0.5, p, seed)
    expected = y, *reference.linear_backward(grad, x, xa, weight, a, b, 0.5, p, seed, True)
    inputs = [tensor.cuda().requires_grad_() for tensor in (x, a, b)]
    mine = ops.lora_linear(inputs[0], to_card(weight), bias.cuda(), *inputs[1:], 0.5, p, seed)
    for ours, theirs in zip([mine, *torch.autograd.grad(mine, inputs, grad.cuda())], expected, strict=True):
        assert_near(ours.detach(), theirs, dtype)


def test_few_rows_give_the_same_bits_every_time():
    weight = ops.quantize(torch.randn(4096, 4096, device="cuda")).to_bytes()
    x = torch.randn(7, 4096, device="cuda", dtype=torch.bfloat16)
    a, b = torch.randn(8, 4096, device="cuda"), torch.randn(4096, 8, device="cuda")
    first = ops.lora_linear(x, weight, None, a, b, 0.5)
    assert all(torch.equal(ops.lora_linear(x, weight, None, a, b, 0.5), first) for _ in range(20))


def test_a_training_step_keeps_no_dense_weight():
    """Memory above the weights: the two buffers (one a thread) of the largest layer, and the activations."""
    weights = [ops.quantize(torch.randn(4096, 4096, device="cuda")).to_bytes() for _ in range(8)]
    adapters = [torch.randn(2, 4096, 16, device="cuda", requires_grad=True) for _ in weights]
    x = torch.randn(256, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hidden = x
    for weight, adapter in zip(weights, adapters, strict=True):
        hidden = ops.lora_linear(hidden, weight, None, adapter[0].T, adapter[1], 0.01) / 64
    hidden.sum().backward()
    dense, activations = 4096 * 4096 * 2, 8 * 4 * x.nbytes
    gradients = 3 * sum(adapter.nbytes for adapter in adapters)
    assert torch.cuda.max_memory_allocated() - before < 2 * dense + activations + gradients + 2**25


def test_adamw_equals_the_reference():
    scalars = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    params = [torch.randn(size) for size in (64 * 4096, 300, 1)]
    blocks = [-(-param.numel() // 256) for param in params]
    zeros = [torch.zeros(param.shape, dtype=torch.uint8) for param in params], [torch.zeros(b) for b in blocks]
    state = [[tensor.clone() for tensor in zeros[kind]] for kind in (0, 1, 0, 1)]
    ours = [[tensor.cuda() for tensor in column] for column in (params, *state)]
    for step in range(1, 6):
        grads = [torch.randn(param.shape) for param in params]
        adamw.adamw8bit_step(params, grads, *state, adamw.AdamWStep(step, **scalars))
        on_gpu = [grad.cuda() for grad in grads]
        ops.adamw8bit_step(ours[0], on_gpu, *ours[1:], adamw.AdamWStep(step, **scalars))
        for mine, yours in zip(ours[1], state[0], strict=True):
            assert (mine.cpu() != yours).float().mean() < 1e-3  # fp32 of two devices on the border of two levels
        for mine, yours in zip(ours, [params, *state], strict=True):
            for on_card, tensor in zip(mine, yours, strict=True):
                on_card.copy_(tensor)


@pytest.mark.skipif(which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.timeout(1800)
def test_compute_sanitizer_finds_nothing():
    if os.environ.get("UNDER_SANITIZER"):
        pytest.skip("this is the run it watches")
    tests = "quantize or layer or adamw or few_rows"
    run = subprocess.run(
        ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q",
         "-m", "gpu", "-k", tests, str(Path(__file__))],
        env=os.environ | {"UNDER_SANITIZER": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:]
