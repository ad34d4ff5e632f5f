"""The package under a default device and a default type that are not the module's, as in `configure_model` on a GPU.

Lightning and Fabric run the user's code inside `with root_device`. A tensor that the package makes without a device is
then on the GPU, while the module is on the CPU. Every function must compute the same bits there as anywhere else.
tests/test_twin.py does what users do under `PackageElsewhere`.
"""

import ast
import inspect
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._device import _device_constructors
from torch.utils.checkpoint import checkpoint

import lightning_qlora
from lightning_qlora import (
    PackedWeight,
    PagedAdamW,
    PagedOptimizer,
    QLoRAConfig,
    QLoRAPrecision,
    convert,
    estimate_memory,
    loraplus_groups,
    merge,
    quantize,
)
from lightning_qlora.config import QUANT_TYPES
from lightning_qlora.experts.experts import ExpertParameter
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.logits.deferred_head import defer_logits
from lightning_qlora.quantization import codebooks
from lightning_qlora.tensors.fingerprint import fingerprint
from lightning_qlora.tools import doctor
from tests.conftest import PackageElsewhere, elsewhere
from tests.toys import Loaded, delta, needs, toy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PACKAGE = Path(lightning_qlora.__file__).parent
F32 = torch.float32
SMALL = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}
TORCH_NAMES_DEVICES = needs("torch", "2.12", "before, AdamW and checkpoint make tensors without a device themselves")


def values(result):
    """Everything in a result that has a value: tensors, numbers and texts of modules, state dicts and tuples."""
    if isinstance(result, torch.Tensor):
        return result.detach()
    if isinstance(result, nn.Module):
        return {**result.state_dict(), **{f"grad of {n}": p.grad for n, p in result.named_parameters()}}
    if isinstance(result, PackedWeight):
        return result.bnb_state_dict()
    return result


def same(a, b) -> bool:
    """Bit for bit."""
    a = values(a)
    b = values(b)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check(function, context=elsewhere):
    """The function computes the same in the context, and with float64 as default, with the same random numbers."""
    torch.manual_seed(1)
    expected = function()
    for inside in [context] if context is PackageElsewhere else [context, float64]:
        torch.manual_seed(1)
        codebooks.codebook.cache_clear()
        codebooks.dynamic_map.cache_clear()
        with inside() as mode:
            result = function()
        assert same(result, expected), inside
        assert not getattr(mode, "asked", None)


@contextmanager
def float64():
    """For code whose own tensors have a type; random numbers of float64 would be others."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def net(width=64, **arguments):
    """A converted two-layer module whose B is not zero."""
    with torch.device("cpu"), torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(width, 96, dtype=F32), nn.GELU(), nn.Linear(96, width, bias=False, dtype=F32))
    convert(module, **{**SMALL, **arguments})
    for layer in adapted_layers(module).values():
        layer.lora_B.data.add_(0.01)
    return module


def inputs(*shape, dtype=torch.float32):
    generator = torch.Generator("cpu").manual_seed(3)
    return torch.randn(*shape or (5, 64), dtype=F32, generator=generator, device="cpu").to(dtype).requires_grad_()


def backward(module, x=None):
    """The output and the gradients of input and module."""
    x = inputs() if x is None else x
    y = module(x)
    y.float().square().sum().backward()
    return y, x.grad, module


CONVERSIONS = [
    {},
    {"quant_type": "fp4"},
    {"quant_type": "int4", "double_quant": False},
    {"use_dora": True},
    {"init_lora_weights": "gaussian"},
    {"gradient_checkpointing": True},
    {"compute_dtype": "bf16"},
    {"modules_to_save": ["2"]},
]


@pytest.mark.parametrize("arguments", CONVERSIONS, ids=str)
def test_convert_and_a_training_step(arguments):
    check(lambda: backward(net(**arguments)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", QUANT_TYPES)
def test_quantize_and_its_state_dict_and_fingerprints(kind, dtype):
    weight = inputs(70, 33, dtype=dtype).detach()

    def run():
        packed = quantize(weight, quant_type=kind)
        again = PackedWeight.from_bnb_state_dict(packed.bnb_state_dict())
        return packed, again.dequantize(), again.to_bytes(), fingerprint(weight)

    check(run)


def readable_weights():
    module = net(use_dora=True)
    loss = F.linear(inputs(), module[0].weight).sum() + (inputs() @ module[0].weight.T).square().sum()
    (loss + module[2].weight.norm()).backward()
    return loss, module, module[0].effective_weight(), delta(module[0])


def step_in_checkpoint_and_autocast():
    module = net()
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = checkpoint(module, x, use_reentrant=False).float().square().sum()
    loss.backward()
    return loss, x.grad, module


def experts(transposed):
    owner = nn.Module()
    owner.register_parameter("stack", nn.Parameter(inputs(3, 64, 32).detach(), requires_grad=False))
    layer = ExpertParameter(owner, "stack", 3, transposed).convert(QLoRAConfig(**SMALL), "stack", None, "stack")
    layer.lora_B.data.add_(0.01)
    loss = layer.effective_weight().square().sum() + layer.weight[1].sum()
    loss.backward()
    return loss, owner


def deferred_logits(quantized):
    head = net()[0] if quantized else nn.Linear(64, 97, device="cpu", dtype=F32).requires_grad_(False)
    defer_logits(head)
    hidden = inputs()
    loss = F.cross_entropy(head(hidden), torch.arange(5, device="cpu"))
    loss.backward()
    return loss, hidden.grad, head


def paged_optimizer(kind):
    params = [nn.Parameter(inputs(70, 70).detach()), nn.Parameter(inputs(3).detach())]
    optimizer = kind(params, lr=1e-2)
    for step in range(5):
        for param in params:
            param.grad = param.detach() * 0.1 + step
        optimizer.step()
        if step == 2:
            again = kind(params, lr=1e-2)
            again.load_state_dict(optimizer.state_dict())
            optimizer = again
    states = [*optimizer.state_dict()["state"].values()]
    if kind is PagedAdamW:  # torch's step counter has the default type
        states = [each | {"step": float(each["step"])} for each in states]
    return params, states


def merged(dtype):
    module = net(use_dora=True)
    merge(module, dtype=dtype)
    return module


def estimates():
    dense = nn.Sequential(nn.Linear(64, 64, device="cpu", dtype=F32))
    return (
        estimate_memory(dense, example=inputs(), **SMALL),
        estimate_memory(toy("llama").config, 2, 12, optimizer="adamw8bit", use_dora=True, **SMALL),
    )


def checks_of_the_doctor():
    checks = list(doctor.examine())
    assert all(good for _, _, good in checks), checks
    return [text.partition(";")[0] for _, text, _ in checks]  # the rest is seconds


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (readable_weights, ()),
        (step_in_checkpoint_and_autocast, ()),
        (experts, (False,)),
        (experts, (True,)),
        (deferred_logits, (False,)),
        (deferred_logits, (True,)),
        pytest.param(paged_optimizer, (PagedAdamW,), marks=TORCH_NAMES_DEVICES),
        (merged, ("auto",)),
        (merged, ("bf16",)),
        (estimates, ()),
        pytest.param(checks_of_the_doctor, (), marks=TORCH_NAMES_DEVICES),
    ],
)
def test_the_same_bits(function, arguments):
    check(lambda: function(*arguments))


class WithPagedOptimizer(Loaded):
    def configure_optimizers(self):
        return PagedAdamW(loraplus_groups(self, lr=1e-2))


@pytest.mark.parametrize("arguments", [{}, {"use_dora": True}, {"init_lora_weights": "calibrated"}], ids=str)
def test_configure_model(arguments, trainer, tmp_path):
    """A Trainer and from_pretrained fail under torch.device("meta") without this package too."""
    pytest.importorskip("transformers")
    toy("llama").save_pretrained(tmp_path / "base")

    def run():
        lit = WithPagedOptimizer(tmp_path / "base")
        plugin = QLoRAPrecision(**{**SMALL, **arguments})
        trainer(plugins=plugin, callbacks=PagedOptimizer(), max_steps=2).fit(lit)
        return lit

    check(run, PackageElsewhere)


# What takes a device= and is not named here must be given one.
FACTORIES = {function.__name__ for function in _device_constructors()} | {"Generator"}
FLOATS = {"zeros", "ones", "empty", "rand", "randn", "eye", "linspace", "logspace", "empty_strided"}
ANY_TYPE = {
    "torch.empty(entry.shape, device='meta')",  # transformers compares shapes
}


def calls_without_dtype(source: str) -> set[str]:
    """Text of each call of a torch factory that would make a tensor of the user's default type."""
    calls = {node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    made = {call for call in calls if ast.unparse(call.func) in {f"torch.{name}" for name in FLOATS}}
    return {ast.unparse(call) for call in made if not any(keyword.arg == "dtype" for keyword in call.keywords)}


def calls_without_device(source: str) -> list[tuple[int, str]]:
    """Line and text of each use of a torch factory or a torch module's constructor without a device.

    A factory that is not called at once (`make = torch.zeros`) is one too.
    """
    tree = ast.parse(source)
    calls = []
    given = set()
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and any(keyword.arg == "device" for keyword in node.keywords):
            given.add(node.func)
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            calls += [(node.lineno, ast.unparse(node)) for name in node.names if name.name in FACTORIES]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name) or node in given:
            continue
        owner = node.value.id
        name = node.attr
        call = parents[node]
        called = isinstance(call, ast.Call) and call.func is node
        if owner == "torch" and name in FACTORIES and not (name == "Generator" and (not called or call.args)):
            calls.append((node.lineno, ast.unparse(call)))
        if owner == "nn" and called and "device" in inspect.signature(getattr(nn, name)).parameters:
            calls.append((node.lineno, ast.unparse(call)))
    return calls


def test_every_tensor_of_the_package_is_made_with_a_device():
    calls = {
        f"{path.relative_to(PACKAGE).as_posix()}:{line}: {text}"
        for path in PACKAGE.rglob("*.py")
        for line, text in calls_without_device(path.read_text(encoding="utf-8"))
    }
    assert not calls, "pass device=, or these are on the user's default device"
    assert calls_without_device("x = torch.ones(3)")


def test_every_tensor_of_the_package_is_made_with_a_type():
    texts = {text for path in PACKAGE.rglob("*.py") for text in calls_without_dtype(path.read_text(encoding="utf-8"))}
    assert texts == ANY_TYPE and calls_without_dtype("x = f(torch.ones(3, device='cpu'), torch.arange(3))")


WITHOUT = """\
torch.zeros(3)
torch.tensor([1], dtype=torch.uint8)
f(torch.arange(3))
make = torch.ones
torch.Generator()
nn.Linear(3, 3)
from torch import zeros
torch.as_tensor(x)
torch.randperm(3)
"""
WITH = """\
torch.zeros(3, device=x.device)
torch.Generator('cpu')
g: torch.Generator
tl.zeros(3)
nn.GELU()
"""


def test_tensors_without_a_device_are_found_and_others_are_not():
    assert [line for line, _ in sorted(calls_without_device(WITHOUT))] == [*range(1, 10)]
    assert calls_without_device(WITH) == []
