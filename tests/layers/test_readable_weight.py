"""`layer.weight` read by code that never calls the layer: values and gradients against a dense weight W + s B A."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_qlora import QLoRALinear, convert, disable_adapter, merge
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.plugin.audit import adapters_without_gradient
from tests.toys import delta
from tests.twin import dense_twin, matched


class Reader(nn.Module):
    """Holds a linear layer and reads its weight in one way; the layer itself is never called."""

    def __init__(self, read, width=64, out=48):
        super().__init__()
        self.fc = nn.Linear(width, out)
        self.read = read

    def forward(self, x):
        return self.read(self.fc, x)


class Product(torch.autograd.Function):
    """As mamba-ssm's fused kernels: it gets the weight as a tensor and returns the gradient of it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return F.linear(grad, weight.t()), torch.einsum("bo,bi->oi", grad, x)


def without_asking(x, weight):
    """As a scripted function."""
    with torch._C.DisableTorchFunctionSubclass():
        return x @ weight.t()


READS = {
    "linear by position": lambda fc, x: F.linear(x, fc.weight, fc.bias),
    "linear by keyword": lambda fc, x: F.linear(input=x, weight=fc.weight, bias=fc.bias),
    "own bias": lambda fc, x: F.linear(x, fc.weight, torch.ones(len(fc.bias), dtype=x.dtype)),
    "x @ weight.T": lambda fc, x: x @ fc.weight.T,
    "matmul with t()": lambda fc, x: torch.matmul(x, fc.weight.t()),
    "weight @ x.T": lambda fc, x: (fc.weight @ x.T).T,
    "twice transposed": lambda fc, x: F.linear(x, fc.weight.T.T),
    "einsum": lambda fc, x: torch.einsum("bi,oi->bo", x, fc.weight),
    "addmm": lambda fc, x: torch.addmm(fc.bias, x, fc.weight.t()),
    "rows": lambda fc, x: F.linear(x, fc.weight[8:24]),
    "scaled": lambda fc, x: F.linear(x, fc.weight * 0.5 + 1),
    "cat": lambda fc, x: F.linear(x, torch.cat([fc.weight, fc.weight])),
    "penalty": lambda fc, x: 1e-2 * fc.weight.pow(2).sum() + x.sum(),
    "norm": lambda fc, x: F.linear(x, F.normalize(fc.weight + 1, dim=1)),
    "product of two weights": lambda fc, x: F.linear(F.linear(x, fc.weight), F.linear(fc.weight, fc.weight)),
    "checkpoint": lambda fc, x: checkpoint(lambda x: F.linear(x, fc.weight) @ fc.weight, x, use_reentrant=False),
}


def with_twin(module, **arguments):
    """A converted module whose adapters are not 0, and its dense twin."""
    plain = copy.deepcopy(module)
    convert(module, **{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **arguments})
    with torch.no_grad():
        for layer in adapted_layers(module).values():
            layer.lora_B.normal_(std=0.1)
            if layer.lora_magnitude_vector is not None:
                layer.lora_magnitude_vector.mul_(1.1)
    return module, dense_twin(module, plain)


def readers(read, **arguments):
    return with_twin(Reader(read), target_modules=["fc"], **arguments)


def compare(module, twin, x, call=nn.Module.__call__):
    """The outputs, and the gradients of the input and of what trains, are those of the dense twin."""
    pairs = [pair for pair in matched(module, twin).values() if pair[0].requires_grad]
    results = []
    for i, each in enumerate((module, twin)):
        inputs = x.clone().requires_grad_()
        y = call(each, inputs)
        (y * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).square().sum().backward()
        results.append([y.detach(), inputs.grad, *(pair[i].grad for pair in pairs)])
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, rtol=2e-4, atol=2e-4 * expected.abs().max().item())
        assert ours.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "use_dora"),
    [*((name, False) for name in READS), ("own bias", True), ("x @ weight.T", True), ("cat", True)],
)
def test_every_read_sees_the_adapter_and_trains_it(name, use_dora):
    compare(*readers(READS[name], use_dora=use_dora), torch.randn(5, 64))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("below_autograd", [Product.apply, without_asking])
def test_code_that_torch_calls_without_asking_gets_the_values_and_returns_their_gradient(below_autograd, dropout):
    """Also where the layer is called too, and where one read is used twice."""

    def read(fc, x):
        weight = fc.weight
        return below_autograd(x, weight) + below_autograd(2 * x, weight) + F.linear(x, fc.weight * 0.5)

    module, dense = readers(read)
    module.fc.lora_dropout = dropout
    compare(module, dense, torch.randn(5, 64))


@pytest.mark.parametrize("below_autograd", [Product.apply, without_asking])
def test_gradients_that_are_asked_for_pass_through_code_that_torch_calls_without_asking(below_autograd):
    """By `autograd.grad`, also for a second derivative, and by `backward(inputs=...)`; no other `.grad` is written."""
    module, twin = readers(lambda fc, x: below_autograd(x, fc.weight) + F.linear(x, fc.weight))
    pairs = [pair for pair in matched(module, twin).values() if pair[0].requires_grad]
    x = torch.randn(5, 64)
    results = []
    for i, each in enumerate((module, twin)):
        a, b = (pair[i] for pair in pairs)
        (of_a,) = torch.autograd.grad(each(x).square().mean(), [a], create_graph=True)
        results.append([of_a.detach(), *torch.autograd.grad(of_a.square().sum(), [b])])
        each(x).square().mean().backward(inputs=[a])
        assert b.grad is None
        results[-1].append(a.grad)
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_a_weight_is_freed_after_the_backward_pass():
    """Without the search for cycles; and no gradient of its size stays."""
    module, _ = readers(None)
    weight = module.fc.weight
    freed = weakref.ref(weight)
    gc.disable()
    try:
        Product.apply(torch.randn(5, 64), weight).sum().backward()
        assert weight.grad is None
        del weight
        assert freed() is None
    finally:
        gc.enable()


def test_the_forward_method_of_a_function_gets_values_without_dropout_also_transposed():
    class Transposed(Product):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.t()

    module, twin = readers(lambda fc, x: Transposed.apply(x, fc.weight))
    module.fc.lora_dropout = 0.5
    compare(module, twin, torch.randn(5, 64))


def test_a_read_without_a_gradient_is_named():
    module, _ = readers(lambda fc, x: x @ fc.weight.detach().T)
    x = torch.randn(5, 64, requires_grad=True)
    module(x).sum().backward()
    assert adapters_without_gradient({"fc": module.fc}) == ["fc"]


@pytest.mark.parametrize(("read", "size"), [("einsum", 2e-5), ("cat", 2e-4), ("merged", 2e-5)])
def test_small_updates_arrive_in_a_16_bit_weight_that_is_read(read, size):
    """The share of s B A in what a reader sees, where rounding to the nearest leaves 0.6; equal reads are equal."""
    shares = []
    for seed in range(8):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(256, 256, bias=False, dtype=torch.bfloat16))
        module[0].weight.data.normal_(std=0.02)
        convert(module, r=8, lora_alpha=8, lora_dropout=0.0)
        layer = module[0]
        eye = torch.eye(256, dtype=torch.float64)
        layer.lora_B.data.copy_(torch.randn(256, 8).sign() * size)
        added = delta(layer).double()
        before = layer.decode().double()
        if read == "einsum":
            seen = torch.einsum("bi,oi->bo", eye, layer.weight.double()).T
        elif read == "cat":
            seen = torch.cat([layer.weight[:100], layer.weight[100:]]).double()
        else:
            assert torch.equal(layer.weight + 0, layer.weight + 0)
            seen = merge(module)[0].weight.double()
        shares.append(float(((seen - before) * added).sum() / added.square().sum()))
    assert 0.95 < sum(shares) / len(shares) < 1.05


@pytest.mark.parametrize("read", ["linear by position", "x @ weight.T"])
def test_products_run_the_op_of_the_layer_with_dropout_and_no_dense_weight(read, monkeypatch):
    module, _ = readers(READS[read], lora_dropout=0.5)
    monkeypatch.setattr(QLoRALinear, "effective_weight", lambda self: pytest.fail("the weight was decoded"))
    x = torch.randn(5, 64)
    torch.manual_seed(1)
    ours = module(x)
    torch.manual_seed(1)
    called = module.fc(x) - (0 if read == "linear by position" else module.fc.bias)
    assert_close(ours, called)
    assert not torch.equal(module(x), ours)  # another mask


def test_bf16_autocast_and_evaluation():
    module, dense = readers(READS["einsum"])
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert_close(module(x), dense(x))
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype is torch.bfloat16
        assert_close(y.float(), dense(x), rtol=2e-2, atol=2e-2)
    module.to(torch.bfloat16)
    assert module.fc.weight.dtype is torch.bfloat16
    with torch.inference_mode():
        y = module(x.bfloat16())
    assert_close(y.float(), dense(x), rtol=2e-2, atol=2e-2)


def test_functional_call_reads_the_parameters_it_is_given():
    module, _ = readers(READS["einsum"])
    x = torch.randn(5, 64)
    zeros = {"fc.lora_B": torch.zeros_like(module.fc.lora_B)}
    assert_close(torch.func.functional_call(module, zeros, (x,)), x @ module.fc.decode().T)


def test_compiled_code_computes_the_same():
    names = ("linear by position", "x @ weight.T", "einsum", "penalty")
    module, dense = readers(lambda fc, x: sum(READS[name](fc, x) for name in names))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compare(module, dense, torch.randn(5, 64), lambda each, x: compiled(x) if each is module else each(x))


def attention():
    return nn.MultiheadAttention(64, 4, batch_first=True)


def encoder():
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("build", [attention, encoder])
def test_torchs_attention_and_encoders_use_the_adapters_in_evaluation_and_train_them(build):
    torch.manual_seed(0)
    module, twin = with_twin(build())
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True

    def run(module, x, **more):
        return module(x, x, x, key_padding_mask=padding)[0] if build is attention else module(x, **more)

    assert any(name.endswith("out_proj") for name in adapted_layers(module))
    x = torch.randn(3, 5, 64)
    compare(module, twin, x, run)
    module.eval()
    twin.eval()
    with torch.no_grad():  # then these modules have a fused path in evaluation that reads the weights
        assert_close(run(module, x), run(twin, x), atol=1e-5, rtol=1e-4)
        if build is encoder:
            ours, expected = (each(x, src_key_padding_mask=padding)[~padding] for each in (module, twin))
            assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        with disable_adapter(module):
            assert (run(module, x) - run(twin, x)).abs().max() > 1e-2
