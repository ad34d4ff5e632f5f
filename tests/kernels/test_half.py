"""Products in fp16 with a power of two: no size of x, of a gradient or of a weight overflows or is lost."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from lightning_qlora import quantize
from lightning_qlora.kernels import eager, reference
from lightning_qlora.kernels.half import Half, scaled_weight, to_half
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import lora_linear
from lightning_qlora.quantization.packed_weight import stack_bytes
from tests.toys import assert_equal

SIZES = [1e-30, 1e-9, 1e-6, 1.0, 1e4, 1e6, 1e12, 1e30]
ERROR = 5e-4  # of the norm; two factors that are rounded to 11 bits have 3e-4, and bf16 has 2.9e-3


def product(a, b, s=1.0):
    """s a b, by a plan of plain torch."""
    return eager.plan(a, LoRA(b.T, b, in_fp16=isinstance(a, Half))).product(a, b, s)


def error(ours, theirs):
    return ((ours.detach().double() - theirs).norm() / theirs.norm()).item()


def layer(size=0.02, double_quant=True, rows=96, columns=256):
    weight = quantize(torch.randn(rows, columns) * size, double_quant=double_quant).to_bytes()
    return weight, torch.randn(8, columns) / columns**0.5, torch.randn(rows, 8) * 2e-4


def run(x, weight, a, b, grad, bias=None, p=0.0, seed=None, function=lora_linear):
    """y and the gradients of x, A and B, by the op."""
    inputs = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    y = function(inputs[0], weight, bias, LoRA(*inputs[1:], 0.5, p, seed, in_fp16=True))
    return y.detach(), *torch.autograd.grad(y, inputs, grad)


def dense(x, weight, a, b, grad, bias=None, keep=1.0):
    """The same by autograd in fp64, with the decoded weight."""
    inputs = [tensor.double().requires_grad_() for tensor in (x, a, b)]
    x, a, b = inputs
    y = x @ reference.dequantize(weight, torch.float32).double().T + 0.5 * (x * keep) @ a.T @ b.T
    if bias is not None:
        y = y + bias.double()
    return y.detach(), *torch.autograd.grad(y, inputs, grad.double())


def are_near(operands, limit=ERROR, count=4):
    """Whether y and the gradients of x, A and B, or the first of them, are those of fp64."""
    pairs = zip(run(*operands)[:count], dense(*operands)[:count], strict=True)
    return all(error(ours, theirs) < limit for ours, theirs in pairs)


@pytest.mark.parametrize("of_grad", [1e-12, 1.0, 1e6])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_an_input_and_a_gradient_has_the_same_error(size, of_grad):
    weight, a, b = layer()
    x = torch.randn(40, 256) * size
    grad = torch.randn(40, 96) * of_grad
    for ours, theirs in zip(run(x, weight, a, b, grad), dense(x, weight, a, b, grad), strict=True):
        assert ours.dtype is torch.float32
        if theirs.abs().max() > 1e-30 and theirs.abs().max() < 1e38:  # fp32 itself ends there
            assert error(ours, theirs) < ERROR


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("size", [1e-38, 1e-12, 1e-7, 1e5, 1e9])
def test_a_weight_that_fp16_does_not_have(size, double_quant):
    """Scales above 65504 decoded to infinity, and small ones to zero."""
    weight, a, b = layer(size, double_quant)
    x = torch.randn(40, 256)
    grad = torch.randn(40, 96)
    limit = ERROR if size > 1e-30 else 1e-2  # a scale in 8 bits of subnormal numbers has few bits itself
    assert are_near((x, weight, a, b, grad), limit, count=2)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("m", [1, 40])
def test_dropout_and_bias(m, p):
    """1 / (1 - p) takes values past the end of fp16, too."""
    weight, a, b = layer()
    x = torch.randn(m, 256) * 1e6
    grad = torch.randn(m, 96) * 1e-9
    bias = torch.randn(96) * 1e6
    seed = torch.tensor([7]) if p else None
    keep = reference.dropout(torch.ones_like(x), p, seed).double()
    ours = run(x, weight, a, b, grad, bias, p, seed)
    for one, other in zip(ours, dense(x, weight, a, b, grad, bias, keep), strict=True):
        assert error(one, other) < 2 * ERROR or not other.any()  # of A: three factors are rounded


def test_nan_and_infinity_stay_in_their_rows():
    weight, a, b = layer()
    x = torch.randn(6, 256)
    x[1, 3] = torch.nan
    x[3, 5] = torch.inf
    x[4] = 0
    y = lora_linear(x, weight, None, LoRA(a, b, 0.5, in_fp16=True))
    assert y[1].isnan().all()
    assert not y[3].isfinite().any()
    assert not y[4].any()
    good = [0, 2, 5]
    assert error(y[good], dense(x[good], weight, a, b, torch.zeros(3, 96))[0]) < ERROR
    grad = torch.zeros(6, 96)
    grad[2, 2] = torch.nan
    gradients = run(torch.randn(6, 256), weight, a, b, grad)[1:]
    assert gradients[0][2].isnan().all()
    assert gradients[0][[0, 1, 3, 4, 5]].isfinite().all()
    assert gradients[1].isnan().all()


def test_one_huge_value_or_column_leaves_the_others_their_digits():
    """As the massive activations of Gemma and Llama."""
    weight, a, b = layer()
    x = torch.randn(64, 256)
    x[:, 7] *= 3e5
    x[0, 0] = 1e6
    grad = torch.randn(64, 96)
    assert are_near((x, weight, a, b, grad))
    rest = torch.randn(8, 256)
    beside = torch.cat([rest, torch.full((1, 256), 2.0**20)])
    y = lora_linear(beside, weight, None, LoRA(a, b, 0.5, in_fp16=True))[:8]
    assert error(y, dense(rest, weight, a, b, torch.zeros(8, 96))[0]) < ERROR


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_rows_of_any_size_keep_their_digits_beside_each_other(p):
    """Of y and dX. To the gradients of A and B all of these rows give as much."""
    weight, a, b = layer()
    sizes = torch.logspace(-18, 18, 40)[:, None]
    x = torch.randn(40, 256) * sizes
    grad = torch.randn(40, 96) / sizes
    seed = torch.tensor([7]) if p else None
    keep = reference.dropout(torch.ones_like(x), p, seed).double()
    ours = run(x, weight, a, b, grad, p=p, seed=seed)
    theirs = dense(x, weight, a, b, grad, keep=keep)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert ((one - other).norm(dim=1) < ERROR * other.norm(dim=1)).all()
    for one, other in zip(ours[2:], theirs[2:], strict=True):
        assert error(one, other) < 2 * ERROR


@pytest.mark.parametrize("values", [torch.zeros(3, 4), torch.empty(0, 4), torch.full((2, 2), torch.nan)])
def test_a_matrix_without_finite_values_other_than_zero(values):
    half = to_half(values)
    assert half.values.dtype is torch.float16 and half.values.shape == values.shape and half.factor.shape == (1,)
    assert_close(half.to_fp32(), values, equal_nan=True)


@pytest.mark.parametrize("exponent", [-149, -130, -126, -20, 0, 20, 100, 127])
def test_the_power_is_exact_and_the_largest_value_is_in_the_middle(exponent):
    x = torch.tensor([[1.0, -1.5, 0.25]]).double() * 2.0**exponent
    half = to_half(x.float())
    assert half.values.abs().max() < 2**14 and (exponent < -125 or half.values.abs().max() >= 2**13)
    assert torch.equal(half.values.double() * half.factor.double(), x.float().double())
    assert torch.frexp(half.factor)[0] == 0.5


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_in_the_range_of_fp16_keeps_its_decoded_values(double_quant):
    """Also if its bytes begin anywhere, as FSDP cuts them."""
    weight, *_ = layer(double_quant=double_quant)
    expected = reference.dequantize(weight, torch.float32)
    shifted = [torch.cat([part.new_zeros(1), part.view(-1)])[1:].view(part.shape) for part in weight[:3]]
    for each in (weight, weight._replace(absmax=shifted[1], nested=shifted[2])):
        divided, factor = scaled_weight(each)
        assert torch.equal(reference.dequantize(divided, torch.float32) * factor, expected)
        assert [part.shape for part in divided[:3]] == [part.shape for part in weight[:3]]


def test_the_host_does_not_wait_for_the_power():
    """A fake tensor has no values, so reading one is an error."""
    with FakeTensorMode():
        x = torch.randn(4, 8)
        y = product(to_half(x), to_half(torch.randn(8, 2)))
    assert y.shape == (4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_keeps_no_tensor_of_the_mode_or_thread_before(dtype):
    """One of a fake tensor or of inference mode would break training after it; no other test multiplies in fp64."""
    a = torch.randn(4, 8, dtype=dtype)
    b = torch.randn(8, 2, dtype=dtype)
    expected = 0.5 * (a @ b)
    with FakeTensorMode() as mode:
        assert product(mode.from_tensor(a), mode.from_tensor(b), 0.5).shape == (4, 2)
    with torch.inference_mode():
        assert_close(product(a, b, 0.5), expected)
    inputs = a.clone().requires_grad_(), b.clone().requires_grad_()
    y = product(*inputs, 0.5)
    assert_close(y, expected)
    gradients = 0.5 * b.sum(1).expand(4, 8), 0.5 * a.sum(0)[:, None].expand(8, 2)
    assert_close(torch.autograd.grad(y.sum(), inputs), gradients)
    with ThreadPoolExecutor(2) as pool:
        for y in pool.map(lambda _: product(a, b, 0.5), range(20)):
            assert_close(y, expected)


def test_an_adapter_that_is_disabled_has_rank_0():
    weight, a, b = layer()
    x = torch.randn(5, 256) * 1e6
    assert are_near((x, weight, a[:0], b[:, :0], torch.ones(5, 96)), count=2)


def test_the_compiled_op_and_its_schema():
    weight, a, b = layer()
    x = torch.randn(2, 3, 256) * 1e6
    grad = torch.randn(2, 3, 96) * 1e-9
    function = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    compiled = run(x, weight, a, b, grad, function=function)
    assert_equal(compiled, run(x, weight, a, b, grad))
    lora = LoRA(a, b, 0.5, in_fp16=True)
    torch.library.opcheck(torch.ops.lightning_qlora.lora_linear, (x, *weight, None, *lora))
    xa = torch.randn(6, 8)
    torch.library.opcheck(torch.ops.lightning_qlora.lora_linear_backward, (grad, x, xa, *weight, *lora, True))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_backward_pass_gets_x_in_fp16_and_an_adapter_that_changed_its_type(p):
    """The bytes of x are half of those in fp32. `.data =` between the two passes, as FSDP does."""
    weight, a, b = layer()
    x = torch.randn(2, 20, 256) * 1e6
    grad = torch.randn(2, 20, 96)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    lora = LoRA(*inputs[1:], 0.5, p, torch.tensor([7]) if p else None, in_fp16=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.dtype, t.shape)) or t, lambda t: t):
        y = lora_linear(inputs[0], weight, None, lora)
    assert (torch.float16, (40, 256)) in saved and (torch.float32, x.shape) not in saved
    expected = run(x, weight, a, b, grad, p=p, seed=lora.seed)[1:]
    assert_equal(torch.autograd.grad(y, inputs, grad, retain_graph=True), expected)
    inputs[2].data = inputs[2].data.bfloat16().double()
    ours = torch.autograd.grad(y, inputs[:2], grad)
    theirs = run(x, weight, a, b.bfloat16().float(), grad, p=p, seed=lora.seed)[1:3]
    assert_equal(ours, theirs)


def test_a_small_adapter_arrives_beside_a_large_bias():
    """One rounding, to fp32: the share of the adapter's part in y that arrives."""
    weight, a, b = layer()
    x = torch.randn(64, 256)
    bias = torch.full((96,), 8.0)
    with_b, without = (
        lora_linear(x, weight, bias, LoRA(a, part, 0.5, in_fp16=True)).double() for part in (b, torch.zeros_like(b))
    )
    expected = 0.5 * x.double() @ a.double().T @ b.double().T
    assert ((with_b - without) * expected).sum() / expected.square().sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("backend", [eager, reference], ids=["eager", "reference"])
def test_experts_of_the_specification(backend):
    weights, a, b = zip(*(layer() for _ in range(3)), strict=True)
    x = torch.randn(12, 256) * 1e6
    ends = torch.tensor([4, 4, 11], dtype=torch.int32)
    lora = LoRA(torch.stack(a), torch.stack(b), 0.5, in_fp16=True)
    y, _ = backend.grouped_linear(to_half(x), ends, stack_bytes(weights), lora)
    expected = torch.cat([dense(x[:4], weights[0], a[0], b[0], torch.zeros(4, 96))[0],
                          dense(x[4:11], weights[2], a[2], b[2], torch.zeros(7, 96))[0]])  # fmt: skip
    assert error(y[:11], expected) < ERROR
    assert not y[11].any()
