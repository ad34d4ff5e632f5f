import re
from contextlib import suppress

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_qlora import convert, quantize
from lightning_qlora.config import QUANT_TYPES
from lightning_qlora.kernels import eager, ops, reference, scratch
from lightning_qlora.kernels.backends import backend
from lightning_qlora.kernels.grouped_linear import can_group, grouped_linear
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import is_plain_call, lora_linear
from lightning_qlora.quantization.packed_weight import stack_bytes
from tests.kernels.forward import forward
from tests.toys import assert_equal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(rows=48, columns=36, r=4, lead=(2, 5), dtype=torch.float32, kind=()):
    """A 4-bit weight, x, a bias and an adapter."""
    weight = quantize(torch.randn(rows, columns), *kind).to_bytes()
    x = torch.randn(*lead, columns, dtype=dtype, requires_grad=True)
    lora_a = torch.randn(r, columns, requires_grad=True)
    lora_b = torch.randn(rows, r, requires_grad=True)
    return weight, x, torch.randn(rows, requires_grad=True), LoRA(lora_a, lora_b, 0.5)


def experts(count):
    """The weights of several, and their adapters."""
    weights, _, _, loras = zip(*(make(24, 64) for _ in range(count)), strict=True)
    a, b = (torch.stack(matrices).detach().requires_grad_() for matrices in list(zip(*loras, strict=True))[:2])
    return weights, LoRA(a, b, 0.5)


def dropped_by(lora, p, seed=7):
    """The adapter with dropout, if p is not 0."""
    return lora._replace(p=p, seed=torch.tensor([seed]) if p else None)


def dense(x, weight, bias, lora):
    """The formula, for autograd to differentiate."""
    base = reference.dequantize(weight, x.dtype)
    y = x @ base.T + lora.scaling * ((x @ lora.a.T.to(x.dtype)) @ lora.b.T.to(x.dtype))
    return y if bias is None else y + bias.to(x.dtype)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (2, 1, 3)])
def test_output_and_gradients_are_those_of_the_dense_formula(with_bias, lead):
    weight, x, bias, lora = make(lead=lead)
    inputs = [x, *lora[:2]] + ([bias] if with_bias else [])
    bias = bias if with_bias else None
    y = lora_linear(x, weight, bias, lora)
    expected = dense(x, weight, bias, lora)
    assert_close(y, expected)
    grad = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(output, inputs, grad) for output in (y, expected))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "p"), [((0,), 0.0), ((2, 0), 0.1)])
def test_an_input_without_rows_has_an_output_without_rows(dtype, lead, p):
    """As an expert that no token chose gets it; columns of whole runs, for the loops that once read four rows."""
    weight, x, bias, lora = make(columns=128, lead=lead, dtype=dtype)
    y = lora_linear(x, weight, bias, dropped_by(lora, p))
    assert y.shape == (*lead, 48)
    grads = torch.autograd.grad(y.sum(), [x, bias, *lora[:2]])
    assert grads[0].shape == x.shape
    assert all((grad == 0).all() for grad in grads[1:])


def test_operands_that_do_not_fit_are_refused():
    """The fused products read by address, so they would read past the input or the weight."""
    weight, x, bias, lora = make(columns=128, dtype=torch.bfloat16)
    expected = "lora_linear: with a weight [48, 128] x must be [..., 128], A [r, 128], B [48, r] and bias [48]; got x "
    for operands, text in (
        ((x[..., :64], None, lora), "[2, 5, 64] and [(4, 128), (48, 4), None]."),
        ((x, None, lora._replace(a=lora.a[:, 1:])), "[2, 5, 128] and [(4, 127), (48, 4), None]."),
        ((x, None, lora._replace(b=lora.b[:, 1:])), "[2, 5, 128] and [(4, 128), (48, 3), None]."),
        ((x, None, lora._replace(b=lora.b[1:])), "[2, 5, 128] and [(4, 128), (47, 4), None]."),
        ((x, bias[1:], lora), "[2, 5, 128] and [(4, 128), (48, 4), (47,)]."),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(expected + text)}$"):
            lora_linear(operands[0], weight, *operands[1:])
    with pytest.raises(TypeError, match=r"^x: must be float32, bfloat16 or float16, not torch\.float64\.$"):
        lora_linear(x.double(), weight, None, lora)
    with pytest.raises(TypeError, match=r"^x: must be float32 for products in fp16 whose .* not torch\.bfloat16\.$"):
        lora_linear(x, weight, None, lora._replace(in_fp16=True))
    wide = torch.cat([x, x], -1)
    lora = lora._replace(a=torch.cat([lora.a, lora.a], -1))
    wrong = weight._replace(shape=(48, 256))
    with pytest.raises(ValueError, match=r"has 6144 bytes of codes, 192 of scales and 8 of .*; got 3072"):
        torch.ops.lightning_qlora.lora_linear(wide, *wrong, None, *lora)
    with pytest.raises(ValueError, match="has 6144 bytes"):
        torch.ops.lightning_qlora.dequantize(*wrong, torch.float32)


TENSORS = ("packed", "absmax", "lora_a", "lora_b", "bias")


@pytest.mark.parametrize("m", [1, 40], ids=["few-rows", "rows"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("places", [("packed", "absmax", "nested"), *TENSORS, TENSORS], ids=str)
def test_another_device_than_that_of_the_input_is_an_error(places, grad, m):
    """Each of these ended the process: kernels read from an address of another device."""
    weight, x, bias, lora = make(rows=64, columns=64, lead=(m,))
    layer = {"lora_a": lora.a, "lora_b": lora.b, "bias": bias}
    places = places if isinstance(places, tuple) else (places,)
    for key in places:
        if key in layer:
            layer[key] = layer[key].detach().to("meta")
        else:
            weight = weight._replace(**{key: getattr(weight, key).to("meta")})

    def pattern(has_bias):
        """A weight on two devices has an error of its own."""
        if places != ("packed", "absmax", "nested") and {"packed", "absmax"} & {*places}:
            return "A 4-bit weight has its codes on .* Move all to one device"
        names = {"packed": "the 4-bit weight", "lora_a": "A", "lora_b": "B"} | (
            {"bias": "the bias"} if has_bias else {}
        )
        texts = [f"{name} is on {'meta' if key in places else 'cpu'}" for key, name in names.items()]
        return re.escape(
            f"x is on cpu, {', '.join(texts)}. All must be on one device: move the input with x.to(device), "
        )

    lora = LoRA(layer["lora_a"], layer["lora_b"], 0.5)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=pattern(True)):
        lora_linear(x, weight, layer["bias"], lora)
    if places != ("bias",):  # the experts of one function have none
        with pytest.raises(ValueError, match=pattern(False)):
            can_group(x, weight, lora)


def test_a_layer_without_values_names_itself():
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    convert(net, r=4)
    net[1].to("meta")
    with pytest.raises(ValueError, match=r"1: x is on cpu, the 4-bit weight is on meta, .*load them first"):
        net(torch.randn(2, 64))


def test_a_second_derivative_of_a_compiled_layer_is_an_error():
    torch.compiler.reset()  # after other shapes torch compiles for any, and has a message of its own
    weight, x, bias, lora = make()
    y = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)(x, weight, bias, lora).sum()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(y, x, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_derivatives_of_every_order_are_those_of_plain_torch(p, dtype):
    weight, x, bias, lora = make()
    x = (x.detach() / 8).to(dtype).requires_grad_()
    lora = dropped_by(lora, p)
    values = [x, bias, lora.a, lora.b]

    def plain(x, weight, bias, lora):
        matrix = reference.dequantize(weight, x.dtype).float()
        x = x.float()
        return x @ matrix.T + bias + lora.scaling * reference.dropout(x, lora.p, lora.seed) @ lora.a.T @ lora.b.T

    results = []
    for layer in (lora_linear, plain):
        energy = layer(x, weight, bias, lora).float().sin().sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        (third,) = torch.autograd.grad(force.float().square().mean(), x, create_graph=True)
        second = torch.autograd.grad(force.float().square().mean(), values, retain_graph=True, materialize_grads=True)
        results.append([force, third, *second, *torch.autograd.grad(third.float().square().mean(), values)])
    for ours, theirs in zip(*results, strict=True):
        tolerance = 1e-5 if dtype is torch.float32 else 0.1
        assert_close(ours.float(), theirs.float(), rtol=0, atol=tolerance * theirs.abs().max().item())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 9),
    st.integers(1, 8),
    st.sampled_from(DTYPES),
    st.tuples(st.sampled_from(QUANT_TYPES), st.sampled_from([32, 64, 4096]), st.booleans()),
)
def test_any_shape_and_type_agrees_with_the_reference(rows, columns, m, r, dtype, kind):
    weight, x, bias, lora = make(rows, columns, r, (m,), dtype, kind)
    y = lora_linear(x, weight, bias, lora)
    expected, xa = forward(reference, x, weight, bias, *lora)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 2e-1}
    assert_close(y, expected, **tolerance)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *lora[:2]], grad)
    with torch.no_grad():
        theirs = reference.linear_backward(grad, x, xa, weight, lora, True)
    assert_close(ours, theirs, **tolerance)


def test_gradcheck_of_the_adapter_in_double_precision_through_the_reference():
    weight = quantize(torch.randn(6, 5)).to_bytes()

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, lora_a, lora_b):
            y, xa = forward(reference, x, weight, None, lora_a, lora_b, 0.7, 0.0, None)
            ctx.save_for_backward(x, xa, lora_a, lora_b)
            return y

        @staticmethod
        def backward(ctx, grad):
            x, xa, lora_a, lora_b = ctx.saved_tensors
            return reference.linear_backward(grad, x, xa, weight, LoRA(lora_a, lora_b, 0.7), True)

    shapes = [(4, 5), (2, 5), (6, 2)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(Reference.apply, inputs)


@pytest.mark.parametrize(("p", "needs_x"), [(0.0, False), (0.3, True)])
def test_opcheck_passes_forward_and_backward(p, needs_x):
    weight, x, bias, lora = make()
    lora = dropped_by(lora, p)
    torch.library.opcheck(torch.ops.lightning_qlora.lora_linear, (x, *weight, bias, *lora))
    lora = lora._replace(a=lora.a.detach(), b=lora.b.detach())
    backward = (torch.randn(2, 5, 48), x.detach(), torch.randn(10, 4), *weight, *lora, needs_x)
    torch.library.opcheck(torch.ops.lightning_qlora.lora_linear_backward, backward)


@pytest.mark.parametrize("double_quant", [True, False])
def test_opcheck_passes_for_quantize_dequantize_and_scales(double_quant):
    weight = torch.randn(5, 77)
    torch.library.opcheck(torch.ops.lightning_qlora.quantize, (weight, "nf4", 64, double_quant))
    packed = quantize(weight, double_quant=double_quant).to_bytes()
    torch.library.opcheck(torch.ops.lightning_qlora.dequantize, (*packed, torch.bfloat16))
    torch.library.opcheck(torch.ops.lightning_qlora.scales, (packed.absmax, packed.nested, None))


def test_the_backward_pass_keeps_x_and_xa_and_parameters_alone():
    weight, x, bias, lora = make(rows=256, columns=128, lead=(64,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, weight, bias, dropped_by(lora, 0.2))
    held = {t.data_ptr() for t in (x, *weight[:3], *lora[:2]) if t.numel()}
    fresh = [tuple(t.shape) for t in kept if t.data_ptr() not in held and t.numel() > 1]
    assert fresh == [(64, 4)]


def test_the_same_seed_makes_the_same_mask_and_the_gradient_uses_it():
    weight, x, _, lora = make(lead=(16,))

    def run(seed):
        return lora_linear(x, weight, None, dropped_by(lora, 0.5, seed))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    dropped = reference.dropout(x, 0.5, torch.tensor([1]))
    expected = x @ reference.dequantize(weight, x.dtype).T + 0.5 * (dropped @ lora.a.T) @ lora.b.T
    assert_close(run(1), expected)
    grad = torch.randn(16, 48)
    ours, theirs = (torch.autograd.grad(y, [x, *lora[:2]], grad) for y in (run(1), expected))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_expectation():
    x = torch.ones(400, 500)
    kept = reference.dropout(x, 0.3, torch.tensor([0]))
    assert kept.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (kept == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(("p", "dtype"), [(0.0, torch.bfloat16), (0.3, torch.float32)])
def test_torch_compile_sees_one_graph(p, dtype):
    """A bias of another type than x, and an input that needs no gradient, too."""
    weight, x, bias, lora = make(dtype=dtype)
    lora = dropped_by(lora, p)

    def function(x):
        return torch.relu(lora_linear(x, weight, bias, lora))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grad = torch.randn(2, 5, 48, dtype=dtype)
    for each, inputs in ((x, [x, bias, *lora[:2]]), (x.detach(), [bias, *lora[:2]])):
        y = compiled(each)
        assert y.dtype is dtype
        gradients = torch.autograd.grad(y, inputs, grad)
        assert_close(gradients, torch.autograd.grad(function(each), inputs, grad))


def test_a_pass_in_inference_mode_does_not_break_the_next_training_step():
    """The reused buffer must not become an inference tensor."""
    weight, x, bias, lora = make(rows=96, columns=80)
    scratch.release()
    with torch.inference_mode():
        first = lora_linear(x, weight, bias, lora)
    second = lora_linear(x, weight, bias, lora)
    second.sum().backward()
    assert_close(first, second.detach())  # the order of the sums differs


@pytest.mark.parametrize("m", [4, 100])
def test_autocast_around_the_op_or_its_backward_changes_nothing(m):
    """It made torch's products bf16, into which the loops then wrote fp32, past their end."""
    weight, x, bias, lora = make(lead=(m,))
    y = lora_linear(x, weight, bias, lora)
    expected = torch.autograd.grad(y.sum(), [x, *lora[:2]], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = lora_linear(x, weight, bias, lora)
        gradients = torch.autograd.grad(y.sum(), [x, *lora[:2]])
    assert torch.equal(inside, y)
    assert_equal(gradients, expected)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_cuda_graph_of_torch_compile_has_the_layers_that_drop_nothing(p):
    """A replay would repeat one dropout mask. What Inductor asks of each node before it captures a graph of them."""
    if not ops.TAGS:
        pytest.skip("this torch has no tag for it")
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    unsafe = []

    def compiler(graph, _):
        unsafe.append(get_first_incompatible_cudagraph_node(graph))
        return make_boxed_func(graph)

    torch._dynamo.reset()
    module = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    convert(module, r=4, lora_dropout=p)
    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    compiled(torch.randn(3, 64)).sum().backward()
    assert len(unsafe) == 2, "a forward and a backward pass"
    names = [str(node and node.target) for node in unsafe]
    if p:
        assert "lora_linear_dropout" in names[0] and "lora_linear_backward_dropout" in names[1]
    else:
        assert names == ["None", "None"]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_recomputation_of_a_checkpointed_block_skips_the_large_product_of_its_last_layer(monkeypatch, p):
    """The tensors that its backward pass needs are saved before that product, and torch stops when it has them all."""
    products = []
    linear_into = eager.Plan.linear_into

    def count(plan, y, *others):
        products.append(y.shape[-1])
        linear_into(plan, y, *others)

    monkeypatch.setattr(eager.Plan, "linear_into", count)
    first, x, _, lora = make(48, 36, lead=(3,))
    last, _, _, last_lora = make(40, 48)
    inputs = [x, *lora[:2], *last_lora[:2]]

    def block(x):
        hidden = lora_linear(x, first, None, dropped_by(lora, p)).relu()
        return lora_linear(hidden, last, None, dropped_by(last_lora, p))

    expected = torch.autograd.grad(block(x).sum(), inputs)
    products.clear()
    y = checkpoint(block, x, use_reentrant=False)
    assert products == [48, 40]
    gradients = torch.autograd.grad(y.sum(), inputs)
    assert products == [48, 40, 48]
    assert_equal(gradients, expected)


def test_plain_tensors_alone_take_the_short_way(monkeypatch):
    x = torch.randn(2, 4)
    a = torch.nn.Parameter(torch.randn(3, 4))
    assert is_plain_call(x, a) and is_plain_call(torch.nn.Parameter(x), a.detach())
    other = type("Other", (torch.Tensor,), {})
    assert not is_plain_call(x.as_subclass(other), a) and not is_plain_call(x, a.detach().as_subclass(other))
    assert not is_plain_call(x.to("meta"), a)
    with TorchDispatchMode():
        assert not is_plain_call(x, a)
    seen = []
    torch.jit.trace(lambda x: seen.append(is_plain_call(x, a)) or x + 1, x, check_trace=False)
    torch.func.vmap(lambda row: seen.append(is_plain_call(torch.zeros(4), a)) or row)(x)
    assert seen == [False, False]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not is_plain_call(x, a)


@pytest.mark.parametrize("lead", [(3,), (1, 3), ()])
def test_a_pass_without_gradient_and_dropout_is_one_call_of_c(monkeypatch, lead):
    if eager.compiled_library() is None:
        pytest.skip("no C compiler")
    weight, x, bias, lora = make(columns=64, lead=lead)
    calls = []
    expected = lora_linear(x, weight, bias, lora)
    linear = eager.Library.lora_linear
    monkeypatch.setattr(eager.Library, "lora_linear", lambda *given: calls.append(given[-1]) or linear(*given))
    with torch.no_grad():
        lora_linear(x, weight, bias, dropped_by(lora, 0.5))
        lora_linear(x, weight, bias, lora._replace(in_fp16=True))
        with forward_ad.dual_level(), suppress(NotImplementedError):
            lora_linear(forward_ad.make_dual(x, x), weight, bias, lora)
        assert all(xa is not None for xa in calls)
        calls.clear()
        y = lora_linear(x, weight, bias, lora)
    assert calls == [None] and y.shape == (*lead, 48)
    assert_close(y, expected)
    with torch.no_grad():
        many = lora_linear(x.new_ones(65, 64), weight, bias, lora)  # more rows than the loops are fast for
    assert many.shape == (65, 48)


def test_experts_in_one_function_are_one_layer_after_another():
    weights, lora = experts(3)
    stack = stack_bytes(weights)
    ends = torch.tensor([4, 4, 9], dtype=torch.int32)
    x = torch.randn(11, 64, requires_grad=True)
    lora = dropped_by(lora, 0.3)
    y = grouped_linear(x, ends, stack, lora)
    dropped = reference.dropout(x, 0.3, lora.seed)
    parts = [
        x[rows] @ reference.dequantize(weights[e], x.dtype).T + 0.5 * dropped[rows] @ lora.a[e].T @ lora.b[e].T
        for e, rows in ((0, slice(4)), (2, slice(4, 9)))
    ]
    expected = torch.cat([*parts, x.new_zeros(2, 24)])
    grad = torch.randn(11, 24)
    assert_close(y, expected)
    ours, theirs = (torch.autograd.grad(of, [x, *lora[:2]], grad, retain_graph=True) for of in (y, expected))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    turned = grouped_linear(x.T.contiguous().T, ends, stack, lora)
    assert torch.equal(turned, y)
    for wrong in (x[:, 1:], x.double()):
        text = f"x must be [rows, 64] of a float type with at most 32 bits; got {[*wrong.shape]}, {wrong.dtype}."
        with pytest.raises(ValueError, match=f"^grouped_linear: {re.escape(text)}$"):
            grouped_linear(wrong, ends, stack, lora)


def test_which_experts_one_function_computes(monkeypatch):
    """On a CPU none; else those whose adapters are of one type and have a rank, outside of torch.compile."""
    weights, lora = experts(2)
    stack = stack_bytes(weights)
    x = torch.randn(3, 64)
    assert can_group(x, stack, lora) is False
    monkeypatch.setattr(backend(x.device), "can_group", lambda *given: given == (x, stack, lora) or given[0] is x)
    assert can_group(x, stack, lora)
    assert not can_group(x, stack, lora._replace(a=lora.a.bfloat16()))
    assert not can_group(x, stack, LoRA(lora.a[:, :0], lora.b[..., :0]))
    assert can_group(x.to("meta"), stack, lora) is False
    with pytest.raises(ValueError, match="A 4-bit weight"):
        can_group(x, stack._replace(packed=stack.packed[:, :-1]), lora)
