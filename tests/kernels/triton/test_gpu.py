"""Every op on the GPU against the reference on the CPU: `pytest -m gpu tests/kernels/triton`, in a few minutes.

With SANITIZER=1 in the environment, compute-sanitizer also watches the small shapes; that takes up to ten minutes more.
"""

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.products import lora_down, lora_gradients, lora_up
from lightning_qlora.config import QUANT_TYPES
from lightning_qlora.kernels import ops, reference, scratch, verdict
from lightning_qlora.kernels.grouped_linear import grouped_linear
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import lora_linear
from lightning_qlora.quantization.packed_weight import stack_bytes
from tests.kernels.forward import forward
from tests.kernels.triton.test_linear import DTYPES, assert_near

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
CARD = torch.device("cuda", 0)
SANITIZED = bool(os.environ.get("UNDER_SANITIZER"))  # a hundred times slower
SHAPES = [(257, 1001), (3, 5)] if SANITIZED else [(4096, 4096), (1000, 4096), (257, 1001), (3, 5)]


def test_the_check_of_the_first_use_finds_no_fault():
    assert verdict.examine(CARD) == dict.fromkeys(verdict.OPS)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
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
            assert torch.equal(ops.dequantize(expected.to(CARD), dtype).cpu(), reference.dequantize(expected, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16, 100] if SANITIZED else [1, 16, 32, 100, 1024])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_layer_forward_and_backward(dtype, rows, p):
    weight = reference.quantize(torch.randn(1000, 512) / 22, "nf4", 64, True)
    x, grad, bias = torch.randn(rows, 512).to(dtype), torch.randn(rows, 1000).to(dtype), torch.randn(1000)
    a, b = torch.randn(16, 512) / 22, torch.randn(1000, 16) / 4
    seed = torch.tensor([2**40 + 3]) if p else None
    y, xa = forward(reference, x, weight, bias, a, b, 0.5, p, seed)
    expected = y, *reference.linear_backward(grad, x, xa, weight, LoRA(a, b, 0.5, p, seed), True)
    inputs = [tensor.cuda().requires_grad_() for tensor in (x, a, b)]
    mine = lora_linear(inputs[0], weight.to(CARD), bias.cuda(), LoRA(*inputs[1:], 0.5, p, seed))
    for ours, theirs in zip([mine, *torch.autograd.grad(mine, inputs, grad.cuda())], expected, strict=True):
        assert_near(ours.detach().cpu(), theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("counts", [[0, 3, 17, 0, 150, 1], [0, 0, 1, 0, 1, 0]])
def test_experts_forward_and_backward_without_a_host_synchronization(dtype, p, counts):
    weights = [reference.quantize(torch.randn(200, 512) / 22, "nf4", 64, True) for _ in counts]
    weight, a, b = stack_bytes(weights), torch.randn(len(counts), 16, 512) / 22, torch.randn(len(counts), 200, 16) / 4
    rows, ends = sum(counts) + 2, torch.tensor(counts).cumsum(0).int()
    x, grad = torch.randn(rows, 512).to(dtype), torch.randn(rows, 200).to(dtype)
    choices = ends, weight, LoRA(a, b, 0.5, p, torch.tensor([2**40 + 3]) if p else None)
    y, xa = reference.grouped_linear(x, *choices)
    expected = y, *reference.grouped_linear_backward(grad, x, xa, *choices)
    inputs = [tensor.cuda().requires_grad_() for tensor in (x, a, b)]
    others = ends.cuda(), weight.to(CARD), LoRA(*inputs[1:], *choices[2][2:])
    on_gpu = grad.cuda()
    mine = grouped_linear(inputs[0], *others)  # the first call compiles
    torch.autograd.grad(mine, inputs, on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mine = grouped_linear(inputs[0], *others)
        grads = torch.autograd.grad(mine, inputs, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip([mine.detach(), *grads], expected, strict=True):
        assert_near(ours.cpu(), theirs, dtype)


@pytest.mark.parametrize("rows", [7, 100, 2048])
def test_forward_and_backward_give_the_same_bits_every_time(rows):
    """Their sums are shared by programs that end in any order."""
    weight = ops.quantize(torch.randn(4096, 4096, device="cuda")).to_bytes()
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    a, b = (torch.randn(shape, device="cuda", requires_grad=True) for shape in ((64, 4096), (4096, 64)))
    grad, seed = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16), torch.tensor([3])

    def run():
        y = lora_linear(x, weight, None, LoRA(a, b, 0.5, 0.1, seed))
        return y.detach(), *torch.autograd.grad(y, [x, a, b], grad)

    first = run()
    for _ in range(20):
        assert all(torch.equal(one, other) for one, other in zip(run(), first, strict=True))


@pytest.mark.parametrize("rows", [7, 512])
def test_captured_graphs_can_be_replayed_in_any_order(rows):
    """The second graph is replayed first, after the buffers of all streams were freed."""
    weight = ops.quantize(torch.randn(4096, 4096, device="cuda")).to_bytes()
    a, b = torch.randn(64, 4096, device="cuda"), torch.randn(4096, 64, device="cuda")
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    expected, graphs, outputs = lora_linear(x, weight, None, LoRA(a, b, 0.5)), [], []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]), torch.no_grad():
            outputs.append(lora_linear(x, weight, None, LoRA(a, b, 0.5)))
    scratch.release()
    for number in (1, 0, 1):
        outputs[number].zero_()
        graphs[number].replay()
        assert torch.equal(outputs[number], expected)


@pytest.mark.parametrize(("rows", "r"), [(8, 8), (512, 64), (4096, 16), (4096, 200)])
def test_products_of_the_adapter_at_the_sizes_of_a_model(rows, r):
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    h = torch.randn(rows, r, device="cuda", dtype=torch.bfloat16)
    w, seed = torch.randn(r, 4096, device="cuda"), torch.tensor([2**40 + 7])
    dropped, rounded = reference.dropout(x.double(), 0.1, seed), w.bfloat16().double()
    grad_a, grad_b = torch.empty_like(w), torch.empty_like(w.T)
    lora_gradients(h, x, grad_a, h, x, grad_b, 0.5, 0.1, seed)
    up = reference.dropout(0.5 * h.double() @ rounded, 0.1, seed)
    for ours, exact, tolerance in [
        (lora_down(x, w, 0.5, 0.1, seed), 0.5 * dropped @ rounded.T, 1e-2),
        (lora_up(h, w.T, torch.empty_like(x), 0.5, 0.1, seed), up, 1e-2),
        (grad_a, h.double().T @ dropped, 1e-4),  # tensor cores truncate where fp32 sums are rounded
        (grad_b, 0.5 * x.double().T @ h.double(), 1e-4),
    ]:
        assert (ours.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_a_training_step_keeps_no_dense_weight():
    """Memory above the weights: the two buffers (one per thread) of the largest layer, and the activations.

    Torch has one workspace of up to 32 MiB for cuBLAS per thread, and our sums take some MiB.
    """
    weights = [ops.quantize(torch.randn(4096, 4096, device="cuda")).to_bytes() for _ in range(8)]
    adapters = [torch.randn(2, 4096, 16, device="cuda", requires_grad=True) for _ in weights]
    x = torch.randn(256, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hidden = x
    for weight, adapter in zip(weights, adapters, strict=True):
        hidden = lora_linear(hidden, weight, None, LoRA(adapter[0].T, adapter[1], 0.01)) / 64
    hidden.sum().backward()
    dense, activations = 4096 * 4096 * 2, 8 * 4 * x.nbytes
    gradients = 3 * sum(adapter.nbytes for adapter in adapters)
    assert torch.cuda.max_memory_allocated() - before < 2 * dense + activations + gradients + 3 * 2**25


@pytest.mark.skipif(not os.environ.get("SANITIZER"), reason="SANITIZER=1 runs it")
@pytest.mark.skipif(which("compute-sanitizer") is None, reason="no compute-sanitizer")
def test_compute_sanitizer_finds_nothing():
    tests = "quantize or layer"
    run = subprocess.run(
        ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q",
         "-m", "gpu", "-k", tests, str(Path(__file__))],
        env=os.environ | {"SANITIZER": "", "UNDER_SANITIZER": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, check=False, timeout=590,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:]
