import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qlora import QLoRALinear, convert, quantize
from lightning_qlora.kernels import ops
from lightning_qlora.layers.dora import row_norm, scale_rows
from lightning_qlora.tensors import device_types
from tests.toys import assert_equal, delta


def converted(layer=None, **arguments):
    layer = layer or nn.Linear(128, 96)
    dense = copy.deepcopy(layer)
    convert(layer, **{"r": 8, **arguments})
    return layer, dense


def randomize(layer):
    layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(3))
    return layer


def test_the_same_layer_with_other_parameters():
    dense = nn.Linear(128, 96)
    seen = []
    dense.register_forward_hook(lambda *_: seen.append(1))
    layer, _ = converted(dense)
    assert layer is dense and isinstance(layer, QLoRALinear) and isinstance(layer, nn.Linear)
    layer(torch.randn(2, 128))
    assert seen == [1]
    assert {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()} == {
        "lora_A": ((8, 128), torch.float32, True),
        "lora_B": ((96, 8), torch.float32, True),
        "bias": ((96,), torch.float32, False),
    }
    stored = layer.packed, layer.absmax, layer.nested
    assert {t.dtype for t in stored} == {torch.uint8} and not list(layer.buffers())
    assert [tuple(t.shape) for t in stored[:2]] == [(96, 64), (96, 2)]
    line = "in_features=128, out_features=96, nf4, block_size=64, r=8, scaling=2, bias=True"
    assert repr(layer) == f"QLoRALinear({line})"


def test_weight_can_be_read_but_not_written(monkeypatch):
    layer, dense = converted()
    expected = quantize(dense.weight).dequantize()
    with monkeypatch.context() as patch:  # its properties decode nothing
        for name in ("decode", "effective_weight"):
            patch.setattr(QLoRALinear, name, lambda self: pytest.fail("decoded"))
        weight = layer.weight
        properties = weight.shape, weight.dtype, weight.device.type, weight.numel(), len(weight), weight.requires_grad
        assert properties == ((96, 128), torch.float32, "cpu", 96 * 128, 96, True)
        with torch.no_grad():
            assert isinstance(layer.weight, torch.Tensor) and not layer.weight.requires_grad
    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer.packed_weight.dequantize(), expected)
    assert torch.equal(layer.weight[3:5] * 2, expected[3:5] * 2)
    assert all(map(torch.equal, layer.weight, expected))
    assert (layer.weight.numpy() == expected.numpy()).all()
    assert_close(nn.functional.linear(torch.ones(1, 128), layer.weight), expected.sum(1)[None])
    target = torch.zeros(96, 128)
    target.copy_(layer.weight)
    assert torch.equal(target, expected)
    with pytest.raises(RuntimeError, match="read-only"):
        layer.weight = nn.Parameter(torch.zeros(96, 128))


WRITES = {
    "data": lambda w: w.data.normal_(),
    "item": lambda w: w.__setitem__(0, 0.0),
    "item of data": lambda w: w.data.__setitem__((0, slice(None)), 0.0),
    "set data": lambda w: setattr(w, "data", torch.zeros(96, 128)),
    "init": torch.nn.init.zeros_,
    "augmented": lambda w: w.__iadd__(1),
    "in place": lambda w: w.mul_(2),
    "out": lambda w: torch.add(torch.ones(96, 128), 1, out=w),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@torch.no_grad()
def test_no_write_to_the_weight_is_lost_in_silence(write):
    layer, _ = converted()
    before = layer.decode()
    with pytest.raises(RuntimeError, match=r"read-only.*layer\.quantize_weight"):
        write(layer.weight)
    assert torch.equal(layer.decode(), before)


def test_a_copy_of_the_weight_is_dense():
    layer = randomize(converted()[0])
    expected = layer.decode() + delta(layer)
    for dense in (copy.deepcopy(layer.weight), layer.weight.detach().clone(), layer.weight.data + 0):
        assert type(dense) is torch.Tensor and not dense.requires_grad
        assert_close(dense, expected)
        dense.zero_()
    assert layer.weight.clone().requires_grad
    assert_close(layer.weight.data[3:5] + 0, expected[3:5])


@pytest.mark.parametrize(
    ("dtype", "mixed"), [(torch.int64, False), (torch.bool, True), (torch.complex64, False)], ids=str
)
def test_an_input_that_is_not_floating_point_is_refused(dtype, mixed):
    layer, _ = converted()
    refused = pytest.raises(TypeError, match=f"x: must be float32, bfloat16 or float16.* not {dtype}")
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed), refused:
        layer(torch.ones(2, 128, dtype=dtype))


def test_compute_type_follows_weight_argument_and_autocast_and_the_output_the_input():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer, _ = converted(nn.Linear(128, 96, dtype=dtype))
        assert layer.compute_dtype(torch.device("cpu")) == (torch.float32 if layer.is_held else dtype)
        assert converted()[0](torch.randn(2, 128, dtype=dtype)).dtype == dtype
    x = torch.randn(2, 128)
    layer = converted(compute_dtype="bf16")[0]
    assert layer.compute_dtype(torch.device("cpu")) == torch.bfloat16
    assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert converted()[0](x).dtype == torch.bfloat16


@pytest.mark.parametrize(("shape", "double_quant"), [((128, 96), True), ((100, 30), False)], ids=str)
def test_code_that_casts_parameters_of_one_dimension_to_fp32_changes_no_byte(double_quant, shape):
    """As test_training in tests/quantization/bnb/test_4bit.py of transformers, and many scripts, for the norms."""
    layer, _ = converted(nn.Linear(*shape).bfloat16(), double_quant=double_quant, r=2)
    x = torch.randn(3, shape[0])
    expected = layer(x)
    for parameter in layer.parameters():
        parameter.requires_grad = False
        if parameter.ndim == 1:
            parameter.data = parameter.data.to(torch.float32)
    assert layer.bias.dtype == torch.float32
    assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("dtype", "use_dora", "tolerance"),
    [(torch.float16, False, 1e-2), (torch.float64, False, 1e-5), (torch.float64, True, 1e-5)],
    ids=str,
)
def test_type_casts_the_adapter_and_no_byte_and_double_computes_in_fp32(dtype, use_dora, tolerance):
    layer, _ = converted(use_dora=use_dora, lora_dropout=0.0)
    x = torch.randn(3, 128)
    randomize(layer)
    expected = layer(x)
    stored = layer.packed, layer.absmax, layer.nested
    layer.type(dtype)
    assert_equal((layer.packed, layer.absmax, layer.nested), stored)
    y = layer(x.to(dtype))
    assert_close(y.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    y.sum().backward()
    values = y, layer.decode(), layer.bias, layer.lora_A.grad, layer.lora_B.grad
    assert {value.dtype for value in values} == {dtype}


def test_conv1d_keeps_its_transposed_weight():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(96, 128)
    conv1d.bias.data.normal_()
    layer, dense = converted(conv1d)
    assert (layer.in_features, layer.out_features) == (128, 96)
    expected = quantize(dense.weight.T).dequantize().T
    assert torch.equal(layer.weight, expected)
    x = torch.randn(2, 5, 128)
    randomize(layer).eval()
    assert_close(layer(x), x @ (expected + delta(layer)) + dense.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 5, 64), (0, 3, 64)])
def test_what_comes_out_may_be_changed_in_place(shape):
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 64))
    convert(net, r=4)
    y = net(torch.randn(shape))
    y += 1
    y.square().sum().backward()
    assert net[0].lora_B.grad.shape == (64, 4)


def test_derivatives_that_are_not_supported_raise_an_error_and_are_never_wrong():
    net = nn.Sequential(nn.Linear(64, 64))
    convert(net, r=4, lora_dropout=0.0)
    x = torch.randn(3, 64)
    func = torch.func
    adapter = {"0.lora_A": net[0].lora_A.detach()}
    for transformed in [
        lambda: func.jvp(net, (x,), (x,)),
        lambda: torch.compile(lambda x: func.jvp(net, (x,), (x,)), backend="eager")(x),
        lambda: func.jacfwd(net)(x),
        lambda: func.grad(lambda x: net(x).sum())(x),
        lambda: func.vmap(func.grad(lambda x: net(x).sum()))(x),
        lambda: func.grad(lambda adapter: func.functional_call(net, adapter, (x,)).sum())(adapter),
        lambda: func.vmap(net)(x),
    ]:
        with pytest.raises(NotImplementedError, match=r"torch\.func.*Use backward"):
            transformed()
    with forward_ad.dual_level():
        for grad_mode in (torch.enable_grad(), torch.no_grad()):
            with grad_mode, pytest.raises(NotImplementedError, match="jvp"):
                net(forward_ad.make_dual(x, x))
    assert torch.equal(func.functional_call(net, adapter, (x,)), net(x))  # without a transform


def test_dora_takes_one_dense_copy_of_a_weight_for_its_rows():
    layer, _ = converted(use_dora=True)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape == layer.weight.shape:
                made.append(result)
            return result

    layer._base_squares = {}
    with Watch():
        row_norm(layer, layer.matrices()[0])
        assert len({each.data_ptr() for each in made}) == 1
        made.clear()
        row_norm(layer, layer.matrices()[0])  # the sums of squares are kept
    assert not made


@pytest.mark.parametrize(("width", "block_size"), [(128, 64), (96, 32), (80, None), (720, None)])
def test_rows_of_a_weight_are_scaled_by_its_scales_where_blocks_are_large_enough(width, block_size):
    layer, _ = converted(nn.Linear(width, 6), r=1)
    factor = torch.arange(6.0)
    scaled = scale_rows(layer.weight_bytes, factor)
    assert (scaled is None) is (block_size is None)
    if scaled is not None:
        assert scaled.block_size == block_size
        assert_close(ops.dequantize(scaled, torch.float32), factor[:, None] * layer.decode())


@pytest.mark.parametrize(
    ("card", "native"),
    [("", True), ("", False), ("gfx906:sramecc+", False), ("gfx90a", True), ("gfx908", True), ("gfx1030", False)],
)
def test_a_model_computes_in_bf16_only_on_a_card_with_bf16_instructions(monkeypatch, card, native):
    """A Turing card counts as supporting bf16 unless emulation is excluded; its tensor cores take fp16."""
    layer, _ = converted()
    supported = lambda including_emulation=True: card or native or including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.version, "hip", card and "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=card))
    device_types._cuda_has_bf16.cache_clear()
    try:
        dtype = layer.compute_dtype(torch.device("cuda"))
    finally:
        device_types._cuda_has_bf16.cache_clear()
    assert dtype is (torch.bfloat16 if native else torch.float16)


def test_each_card_is_asked_whether_it_has_bf16(monkeypatch):
    """A T4 beside an A100, whichever is the current one."""
    current = []

    @contextmanager
    def guard(index):
        current.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: current[-1] == 1)
    device_types._cuda_has_bf16.cache_clear()
    layer, _ = converted()
    try:
        assert [layer.compute_dtype(torch.device("cuda", index)) for index in (0, 1, 0)] == [
            torch.float16, torch.bfloat16, torch.float16,
        ]  # fmt: skip
    finally:
        device_types._cuda_has_bf16.cache_clear()


def test_torch_compile_does_not_trace_the_question_whether_a_card_has_bf16():
    compiled = torch.compile(lambda x: x + device_types.has_bf16(torch.device("cuda")), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == device_types.has_bf16(torch.device("cuda"))


OTHER_LAYOUTS = {
    "jagged": lambda rows: torch.nested.nested_tensor([rows[:2], rows[2:]], layout=torch.jagged),
    "nested": lambda rows: torch.nested.nested_tensor([rows[:2], rows[2:]]),
    "sparse": lambda rows: rows.to_sparse(),
    "csr": lambda rows: rows.to_sparse_csr(),
}


def parts_of(y):
    return list(y.unbind()) if y.is_nested else [y]


@pytest.mark.parametrize("make", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nested_and_sparse_inputs_as_in_a_dense_layer(make, dtype):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 32)).to(dtype)
    convert(module, r=4, lora_dropout=0.0)
    layer = module[0]
    nn.init.normal_(layer.lora_B, std=0.1)
    dense = nn.Linear(64, 32)
    dense.weight.data = layer.weight.detach().float()
    dense.bias.data = layer.bias.detach().float()
    rows = torch.randn(6, 64) * (torch.rand(6, 64) < 0.3)
    y = layer(make(rows.to(dtype)))
    expected = dense(make(rows.to(dtype).float()))
    assert y.is_nested == expected.is_nested and y.layout == expected.layout and y.dtype is dtype
    for ours, other in zip(parts_of(y), parts_of(expected), strict=True):
        torch.testing.assert_close(ours.float(), other, rtol=0.02, atol=0.05 if dtype is torch.bfloat16 else 1e-5)
    sum(part.float().square().sum() for part in parts_of(y)).backward()
    of_nested = layer.lora_B.grad.clone()
    layer.zero_grad()
    layer(rows.to(dtype)).float().square().sum().backward()
    torch.testing.assert_close(of_nested, layer.lora_B.grad, rtol=1e-3, atol=1e-3)


class Labelled(torch.Tensor):
    """As PINA's inputs."""


class Unlabelled(Labelled):
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.mark.parametrize("kind", [torch.Tensor, Labelled, Unlabelled])
def test_a_model_of_forces_trains_as_the_dense_one(kind):
    """A loss of gradients by the input: their gradients by the adapters and by the input are those of W + s B A."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    convert(net, r=4, lora_dropout=0.0, modules_to_save=["4"])
    dense = copy.deepcopy(net)
    for layer in (0, 2):
        net[layer].lora_B.data.normal_()
        part = nn.Linear(64, 64)
        part.weight.data = net[layer].decode() + net[layer].scaling * net[layer].lora_B.data @ net[layer].lora_A.data
        part.bias = net[layer].bias
        dense[layer] = part
    positions = torch.randn(8, 64).as_subclass(kind).requires_grad_()
    targets = torch.randn(8, 64)
    results = []
    for each in (net, dense):
        each.zero_grad()
        forces = -torch.autograd.grad(each(positions).sum(), positions, create_graph=True)[0]
        loss = (forces - targets).square().mean()
        (of_positions,) = torch.autograd.grad(loss, positions, retain_graph=True)
        loss.backward()
        assert type(each(positions)) is (torch.Tensor if kind is Unlabelled else kind)
        results.append((forces, of_positions, each[4].weight.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(net[:4:2], dense[:4:2], strict=True):
        of_weight = ours.scaling * theirs.weight.grad
        torch.testing.assert_close(ours.lora_A.grad, ours.lora_B.T @ of_weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(ours.lora_B.grad, of_weight @ ours.lora_A.T, rtol=1e-3, atol=1e-5)


def test_layers_without_a_second_derivative_say_so():
    net = nn.Linear(64, 64)
    convert(net, r=4, use_dora=True)
    x = torch.randn(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no second derivative with use_dora=True.*modules_to_save"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)
