import copy

import pytest
import torch
from torch import nn

from benchmarks.products import add_matmul_
from lightning_qlora import convert
from lightning_qlora.config import QUANT_TYPES
from lightning_qlora.kernels import backends, reference
from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels.backends import backend
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import lora_linear
from lightning_qlora.kernels.triton import launch, linear
from lightning_qlora.kernels.triton.dropout import dropout_into
from tests.conftest import every_pair
from tests.kernels.forward import forward
from tests.kernels.triton.launches import forget_launches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def layer(rows, columns, r, dtype, m, quant_type="nf4", block_size=64, double_quant=True):
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    weight = reference.quantize(normal(rows, columns) / columns**0.5, quant_type, block_size, double_quant)
    x = normal(m, columns).to(dtype)
    grad = normal(m, rows).to(dtype)
    bias = normal(rows)
    return weight, x, grad, bias, normal(r, columns) / columns**0.5, normal(rows, r) / r**0.5


def assert_near(ours, theirs, dtype):
    scale = theirs.abs().max()
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize(("dtype", "p", "seed"), every_pair(DTYPES, [0.05, 0.5], [0, 1, 2**31, 2**40 + 7, 2**63 - 1]))
def test_dropout_equals_the_reference_bit_for_bit(dtype, p, seed):
    x = torch.randn(1503).to(dtype)
    memory = torch.full((1600,), 7.0, dtype=dtype)
    key = torch.tensor([seed])
    assert torch.equal(dropout_into(memory[:1503], x, p, key), reference.dropout(x, p, key))
    assert (memory[1503:] == 7).all()
    assert torch.equal(dropout_into(x.clone(), x, p, key), memory[:1503])


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_with_a_bias(dtype):
    """More than the product takes that decodes W itself: torch multiplies, and the bias is added afterwards."""
    weight, x, _, bias, lora_a, lora_b = layer(96, 160, 8, dtype, m=300)
    y, _ = forward(kernels, x, weight, bias, lora_a, lora_b, 0.7, 0.0, None)
    dense = reference.dequantize(weight, torch.float32) + 0.7 * lora_b @ lora_a
    assert_near(y, (x.float() @ dense.T + bias).to(dtype), dtype)


def test_gradients_are_contiguous_as_torch_compile_is_told():
    """The shape function says so, and code that Inductor generates reads them by these strides."""
    weight, x, grad, _, *adapter = layer(64, 64, 4, torch.float16, m=20)
    a, b = (of.T.contiguous().T for of in adapter)
    lora = LoRA(a, b, 0.7)
    plan = kernels.plan(x, lora, weight)
    xa = plan.lora_project(x, lora)
    assert all(of.is_contiguous() for of in plan.linear_backward(grad, x, xa, weight, lora, True))


def test_no_dense_weight_is_allocated_twice(monkeypatch):
    weight, x, _, _, lora_a, lora_b = layer(96, 160, 8, torch.float32, m=80)
    forward(kernels, x, weight, None, lora_a, lora_b, 1.0, 0.0, None)
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: made.append(size) or empty(*size, **options))
    forward(kernels, x, weight, None, lora_a, lora_b, 1.0, 0.0, None)
    assert not made


HALVES = [torch.bfloat16, torch.float16]
MATMULS = [(64, 64), (7, 128), (100, 576)]


@pytest.mark.parametrize(("dtype", "m", "shape"), every_pair(HALVES, [1, 16, 17, 64], MATMULS))
def test_few_rows_add_the_product(dtype, m, shape):
    rows = shape[0]
    weight, x, _, bias, _, _ = layer(*shape, 4, dtype, m)
    y = torch.randn(m, rows).to(dtype)
    expected = y.double() + x.double() @ reference.dequantize(weight, torch.float32).double().T
    assert_near(add_matmul_(y.clone(), x, weight).double(), expected, dtype)
    assert_near(add_matmul_(y.clone(), x, weight, bias).double(), expected + bias.double(), dtype)


@pytest.mark.parametrize(
    ("quant_type", "double_quant", "block_size"), every_pair(QUANT_TYPES, [True, False], [32, 64, 256, 4096])
)
def test_every_format_and_block_size(quant_type, double_quant, block_size):
    """Also blocks that cross rows: 192 columns are no whole number of blocks of 256."""
    weight, x, _, _, _, _ = layer(40, 192, 4, torch.float16, 5, quant_type, block_size, double_quant)
    expected = x.double() @ reference.dequantize(weight, torch.float32).double().T
    assert_near(add_matmul_(torch.zeros(5, 40, dtype=x.dtype), x, weight).double(), expected, torch.float16)


@pytest.fixture
def without_tensor_cores(monkeypatch):
    """The tiles of a T4."""
    for kernel, table in launch.TABLE.items():
        monkeypatch.setitem(launch.TABLE, kernel, {"default": table.get("sm_75", table["default"])})
    forget_launches()
    yield
    forget_launches()


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize(
    ("quant_type", "double_quant", "block_size"), every_pair(QUANT_TYPES, [True, False], [32, 64, 256, 4096])
)
def test_one_and_two_rows_without_tensor_cores(without_tensor_cores, m, quant_type, double_quant, block_size):
    """In fp32; outputs that no program divides, and blocks that cross rows."""
    weight, x, _, bias, _, _ = layer(41, 192, 4, torch.float32, m, quant_type, block_size, double_quant)
    expected = x.double() @ reference.dequantize(weight, torch.float32).double().T
    y = torch.randn(m, 41)
    ours = add_matmul_(y.clone(), x, weight, bias)
    assert_near(ours.double(), y + expected + bias.double(), torch.float32)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_layer_of_a_t4_is_that_of_fp64_for_any_number_of_rows(without_tensor_cores, p):
    """One and two rows are multiplied in fp32, more in fp16 with powers of two; the codes begin at any byte."""
    weight, _, _, bias, a, b = layer(41, 192, 4, torch.float32, 1)
    bytes = torch.zeros(weight.packed.numel() + 1, dtype=torch.uint8)[1:]
    weight = weight._replace(packed=bytes.copy_(weight.packed.view(-1)))
    dense = reference.dequantize(weight, torch.float64)
    for m, is_vector in ((1, True), (2, True), (3, False), (40, False)):
        x = 1e5 * torch.randn(m, 192)
        lora = LoRA(a, b, 0.7, p, torch.tensor([3]) if p else None, in_fp16=True)
        assert kernels.plan(x, lora, weight).few_rows is is_vector
        inputs = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
        y = lora_linear(inputs[0], weight, bias, LoRA(*inputs[1:], *lora[2:]))
        grad = torch.randn_like(y)
        ours = y, *torch.autograd.grad(y, inputs, grad)
        x, a64, b64 = (tensor.detach().double().requires_grad_() for tensor in inputs)
        exact = x @ dense.T + 0.7 * reference.dropout(x, p, lora.seed) @ a64.T @ b64.T + bias.double()
        theirs = exact, *torch.autograd.grad(exact, (x, a64, b64), grad.double())
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).norm() < (1e-5 if is_vector else 1e-3) * other.norm()


def test_shares_give_the_same_bits_every_time_and_nothing_past_the_end(monkeypatch):
    monkeypatch.setitem(launch.TABLE, "matmul", {"default": [launch.Tile(M=16, N=64, num_warps=4)]})
    monkeypatch.setattr(launch, "PROGRAMS", 64)
    weight, x, _, _, _, _ = layer(130, 1024, 4, torch.bfloat16, 20)  # three tiles times two
    memory = torch.zeros(20 * 130 + 50, dtype=x.dtype)
    first = add_matmul_(memory[:2600].view(20, 130), x, weight).clone()
    assert (memory[2600:] == 0).all()
    assert torch.equal(add_matmul_(torch.zeros_like(first), x, weight), first)
    assert_near(first, x @ reference.dequantize(weight, x.dtype).T, x.dtype)


def test_no_rows_at_all():
    weight, x, grad, bias, lora_a, lora_b = layer(96, 256, 8, torch.bfloat16, m=0)
    lora = LoRA(lora_a, lora_b, 0.7, 0.3, torch.tensor([5]))
    y, xa = forward(kernels, x, weight, bias, *lora)
    assert (y.shape, xa.shape) == ((0, 96), (0, 8))
    grad_x, grad_a, grad_b = kernels.plan(x, lora, weight).linear_backward(grad, x, xa, weight, lora, True)
    assert grad_x.shape == (0, 256)
    assert not grad_a.any() and not grad_b.any()


def in_fp32(r, p, bias=True):
    """A layer of a module that its user holds in fp32, on a card with bf16."""
    net = nn.Sequential(nn.Linear(192, 160, bias=bias))
    convert(net, r=r, lora_alpha=r, lora_dropout=p, compute_dtype="bf16")
    nn.init.normal_(net[0].lora_B, std=0.02)
    return net


def outcome(net, x, grad, **options):
    """y and the gradients of x, A and B; with dY in bf16 under autocast, as QLoRAPrecision runs a module in fp32."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=grad.dtype is torch.bfloat16):
        y = net(x)
    assert y.dtype is grad.dtype
    return y.detach(), *torch.autograd.grad(y, [x, net[0].lora_A, net[0].lora_B], grad, **options)


def errors(ours, exact):
    return [((one.double() - other).norm() / other.norm()).item() for one, other in zip(ours, exact, strict=True)]


@pytest.mark.parametrize(("m", "r", "p", "bias"), [(5, 4, 0.3, True), (20, 8, 0.3, False), (66, 70, 0.0, True)])
def test_a_layer_in_fp32_rounds_neither_its_output_nor_the_gradient_of_its_input(m, r, p, bias):
    """The kernels that read x and dY first cast them to bf16; y and dX are sums in fp32."""
    net = in_fp32(r, p, bias)
    x, grad = torch.randn(m, 384)[:, ::2], torch.randn(m, 160)
    ours = outcome(net, x, grad)
    assert {one.dtype for one in ours} == {torch.float32}
    rounded = [each.bfloat16().float() for each in (x, grad)]
    for one, other in zip(ours, outcome(net, *rounded), strict=True):
        assert torch.equal(one, other)
    if p:
        in_16_bits = copy.deepcopy(net).bfloat16()
        for one, other in zip(ours, outcome(in_16_bits, *(each.bfloat16() for each in rounded)), strict=True):
            assert (one - other).norm() < 1e-2 * other.norm()
    else:
        layer = net[0]
        inputs = [each.detach().double().requires_grad_() for each in (rounded[0], layer.lora_A, layer.lora_B)]
        dense = layer.packed_weight.dequantize(torch.bfloat16).double()
        y = inputs[0] @ dense.T + inputs[0] @ inputs[1].T @ inputs[2].T + (layer.bias if bias else 0)
        exact = y.detach(), *torch.autograd.grad(y, inputs, rounded[1].double())
        assert max(errors(ours[:2], exact[:2])) < 6e-4  # rounded to bf16 they have 1.7e-3
        assert max(errors(ours[2:], exact[2:])) < 4e-3
    of_y, *gradients = outcome(net, x, grad.bfloat16())
    assert (of_y - ours[0]).norm() < 3e-3 * ours[0].norm()
    for one, other in zip(gradients, ours[1:], strict=True):
        assert one.dtype is torch.float32 and torch.equal(one, other)
    assert not backend(torch.device("cpu")).failures


def test_second_derivatives_and_hooks_of_saved_tensors_of_a_layer_in_fp32():
    net = in_fp32(8, 0.0)
    x, grad = torch.randn(9, 192), torch.randn(9, 160)
    plain = outcome(net, x, grad)
    for one, other in zip(outcome(net, x, grad, create_graph=True), plain, strict=True):
        assert (one - other).norm() < 1e-2 * other.norm()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        assert all(map(torch.equal, outcome(net, x, grad), plain))
    x.requires_grad_()
    (first,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    weight = net[0].effective_weight().detach().double()
    assert (second - 2 * torch.ones(9, 192).double() @ weight.T @ weight).norm() < 2e-2 * second.norm()


def test_a_kernel_that_fails_leaves_a_layer_in_fp32_to_torch(monkeypatch):
    net = in_fp32(8, 0.3)
    x, grad = torch.randn(66, 192), torch.randn(66, 160)
    expected = outcome(net, x, grad)
    for part in range(3):
        backends._backends.clear()
        with monkeypatch.context() as patch:
            patch.setattr(linear, ("lora_down", "finish", "lora_gradients")[part], lambda *_: 1 / 0)
            with pytest.warns(UserWarning, match="plain torch computes"):
                ours = outcome(copy.deepcopy(net), x, grad)
        for one, other in zip(ours, expected, strict=True):
            assert one.dtype is torch.float32 and (one - other).norm() < 1e-2 * other.norm()
    backends._backends.clear()
