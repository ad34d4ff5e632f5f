"""`layer.weight` read by code that never calls the layer: values and gradients against a dense weight W + s B A."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_qlora import QLoRALinear, convert, merge
from lightning_qlora.kernels import ops
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.training.audit import READ, adapters_without_gradient
from tests.toys import delta


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


def readers(read, **arguments):
    """A converted module, and a function of the same parameters with a dense weight."""
    torch.manual_seed(0)
    module = Reader(read)
    convert(module, **{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["fc"], **arguments})
    layer = module.fc
    assert isinstance(layer, QLoRALinear)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.mul_(1.1)

    class Dense:
        bias = layer.bias

        @property
        def weight(self):
            with torch.autocast("cpu", enabled=False):
                total = ops.dequantize(layer.weight_bytes, torch.float32) + layer.scaling * layer.lora_B @ layer.lora_A
            if layer.lora_magnitude_vector is not None:
                total = (layer.lora_magnitude_vector / total.detach().norm(dim=1)).unsqueeze(1) * total
            return total.to(layer.weight_dtype)

    return module, lambda x: read(Dense(), x)


def gradients(layer, function, x):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = function(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.adapter_parameters())]


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_every_read_sees_the_adapter_and_trains_it(read, use_dora):
    module, dense = readers(read, use_dora=use_dora)
    x = torch.randn(5, 64)
    for ours, expected in zip(gradients(module.fc, module, x), gradients(module.fc, dense, x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-4 * expected.abs().max().item())
        assert ours.abs().max() > 0


def test_an_autograd_function_of_other_code_gets_the_values_and_returns_no_gradient():
    """A warning names it before the first step."""
    module, dense = readers(lambda fc, x: Product.apply(x, fc.weight))
    x = torch.randn(5, 64, requires_grad=True)
    y = module(x)
    torch.testing.assert_close(y, dense(x))
    y.sum().backward()
    assert x.grad is not None
    assert adapters_without_gradient({"fc": module.fc}) == {"fc": READ}


@pytest.mark.parametrize("size", [2e-5, 2e-4])
@pytest.mark.parametrize("read", ["einsum", "cat", "merged"])
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
        with torch.no_grad():
            layer.lora_B.copy_(torch.randn(256, 8).sign() * size)
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
    torch.testing.assert_close(ours, called)
    assert not torch.equal(module(x), ours)  # another mask


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    class FalconLinear(nn.Linear):
        def forward(self, input):
            return input @ self.weight.T + self.bias

    for kind, factor in ((Scaled, 2), (FalconLinear, 1)):
        layer = kind(64, 48)
        config_of = nn.Sequential(nn.Linear(64, 48))
        config_of[0].load_state_dict(layer.state_dict())
        convert(config_of, r=4, lora_dropout=0.0)
        QLoRALinear.from_linear(layer, config_of[0].config, "0", None, "0")
        assert isinstance(layer, kind) and isinstance(layer, QLoRALinear)
        with torch.no_grad():
            layer.lora_B.normal_()
            config_of[0].lora_B.copy_(layer.lora_B)
        x = torch.randn(3, 64)
        torch.testing.assert_close(layer(x), factor * config_of(x))
        layer(x).sum().backward()
        assert layer.lora_A.grad.abs().max() > 0


def test_bf16_autocast_and_evaluation():
    module, dense = readers(READS["einsum"])
    x = torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(module(x), dense(x))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(module(x), dense(x))
    module.to(torch.bfloat16)
    assert module.fc.weight.dtype is torch.bfloat16
    with torch.inference_mode():
        y = module(x.bfloat16())
    torch.testing.assert_close(y.float(), dense(x.bfloat16()).float(), rtol=2e-2, atol=2e-2)


def test_functional_call_reads_the_parameters_it_is_given():
    module, _ = readers(READS["einsum"])
    x = torch.randn(5, 64)
    zeros = {"fc.lora_B": torch.zeros_like(module.fc.lora_B)}
    torch.testing.assert_close(torch.func.functional_call(module, zeros, (x,)), x @ module.fc.decode().T)


@pytest.mark.parametrize("read", ["linear by position", "x @ weight.T", "einsum", "penalty"])
def test_compiled_code_computes_the_same(read):
    module, dense = readers(READS[read])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 64)
    for ours, expected in zip(gradients(module.fc, compiled, x), gradients(module.fc, dense, x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-4 * expected.abs().max().item())


def test_multi_head_attention_trains_the_adapters_it_only_reads():
    torch.manual_seed(0)
    q, k, v, out = (nn.Linear(64, 64) for _ in range(4))
    layers = nn.ModuleList([q, k, v, out])
    convert(layers, r=4, lora_dropout=0.0)
    with torch.no_grad():
        for layer in layers:
            layer.lora_B.normal_(std=0.05)

    def attend(weights):
        x = torch.randn(7, 2, 64, generator=torch.Generator().manual_seed(1))
        bias = torch.cat([q.bias, k.bias, v.bias])
        return F.multi_head_attention_forward(
            x,
            x,
            x,
            64,
            4,
            torch.empty(0),
            bias,
            None,
            None,
            False,
            0.0,
            weights[3],
            out.bias,
            use_separate_proj_weight=True,
            q_proj_weight=weights[0],
            k_proj_weight=weights[1],
            v_proj_weight=weights[2],
        )[0]

    results = []
    for weights in ([layer.weight for layer in layers], [x.decode() + x.scaling * x.lora_B @ x.lora_A for x in layers]):
        layers.zero_grad()
        y = attend(weights)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for layer in layers for p in layer.adapter_parameters())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_copy_made_with_gradients_on_is_dense_and_free():
    module, _ = readers(READS["einsum"])
    held = copy.deepcopy(module.fc.weight)
    assert type(held) is torch.Tensor and not held.requires_grad
    torch.testing.assert_close(held, module.fc.decode() + delta(module.fc))


def dense_twin(module):
    """A copy with W + s B A of every 4-bit layer as a dense weight."""
    return merge(copy.deepcopy(module))


def attention():
    return nn.MultiheadAttention(64, 4, batch_first=True)


def encoder():
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("build", [attention, encoder])
def test_torchs_attention_and_encoders_use_the_adapters_in_evaluation_and_train_them(build):
    torch.manual_seed(0)
    module = build()
    x = torch.randn(3, 5, 64)
    convert(module, r=4, lora_dropout=0.0)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True

    def run(module, **more):
        return module(x, x, x, key_padding_mask=padding)[0] if build is attention else module(x, **more)

    layers = adapted_layers(module)
    assert any(name.endswith("out_proj") for name in layers)
    with torch.no_grad():
        before = run(module.eval())
        for layer in layers.values():
            layer.lora_B.normal_(std=0.1)
        # With gradients off, these modules have a fused path in evaluation that reads the weights.
        expected = run(dense_twin(module).eval())
        torch.testing.assert_close(run(module), expected, atol=1e-5, rtol=1e-4)
        assert (run(module) - before).abs().max() > 1e-2
        if build is encoder:
            masked = dense_twin(module).eval()(x, src_key_padding_mask=padding)
            torch.testing.assert_close(
                module(x, src_key_padding_mask=padding)[~padding], masked[~padding], atol=1e-5, rtol=1e-4
            )
    module.train()
    twin = dense_twin(module).requires_grad_(True)
    run(module).square().sum().backward()
    run(twin).square().sum().backward()
    for name, layer in layers.items():
        dense = twin.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.lora_A.grad, layer.scaling * layer.lora_B.T @ dense, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(layer.lora_B.grad, layer.scaling * dense @ layer.lora_A.T, atol=1e-4, rtol=1e-3)
