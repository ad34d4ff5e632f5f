"""The package under a default device and a default type that are not the module's, as in `configure_model` on a GPU.

Lightning and Fabric run the user's code inside `with root_device`. A tensor that the package makes without a device is
then on the GPU, while the module is on the CPU. Every function must compute the same bits there as anywhere else.
"""

import ast
import copy
import inspect
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils.checkpoint import checkpoint

import lightning_qlora
from lightning_qlora import (
    PackedWeight,
    PagedAdamW,
    PagedAdamW8bit,
    PagedOptimizer,
    QLoRAConfig,
    QLoRAPrecision,
    convert,
    estimate_memory,
    load_adapter,
    load_from_checkpoint,
    loraplus_groups,
    merge,
    quantize,
    save_adapter,
)
from lightning_qlora.layers.deferred_head import defer_logits
from lightning_qlora.layers.experts import ExpertParameter, QLoRAExperts
from lightning_qlora.layers.fingerprint import fingerprint
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.quantization import codebooks
from lightning_qlora.tools import doctor
from tests.conftest import Classifier, elsewhere, loader
from tests.toys import Lit, delta, ids, needs, toy
from tests.training import test_fabric as fabric

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PACKAGE = Path(lightning_qlora.__file__).parent
TORCH = str(Path(torch.__file__).parent) + os.sep
OURS = str(PACKAGE) + os.sep
F32 = torch.float32
SMALL = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}
TORCH_NAMES_DEVICES = needs("torch", "2.12", "before, AdamW and checkpoint make tensors without a device themselves")


class PackageElsewhere(TorchFunctionMode):
    """`elsewhere()` for the code of this package alone, for use around a Trainer, a DataLoader or `from_pretrained`.

    These fail themselves under `torch.device("meta")`. Here a tensor without a device is made on the meta device if the
    first caller outside of torch is a file of the package: a torch module or optimizer that it runs counts as its own.

    Attributes:
        asked: The calls without a device, as "file:line"; all of them that should have one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None:
            frame = sys._getframe(1)
            while frame.f_back and frame.f_code.co_filename.startswith(TORCH):
                frame = frame.f_back
            if frame.f_code.co_filename.startswith(OURS):
                self.asked.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def _no_cached_tables():
    for cached in (codebooks.codebook, codebooks.dynamic_map):
        cached.cache_clear()


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


ARGUMENTS = [
    {},
    {"quant_type": "fp4"},
    {"quant_type": "int4", "double_quant": False},
    {"use_dora": True},
    {"use_rslora": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "loftq"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"loftq_config": {"loftq_iter": 2}, "init_lora_weights": "loftq"},
    {"gradient_checkpointing": True},
    {"compute_dtype": "bf16"},
    {"checkpoint": "full"},
    {"modules_to_save": ["2"]},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_convert_and_a_training_step(arguments):
    check(lambda: backward(net(**arguments)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
def test_quantize_and_its_state_dict(kind, dtype):
    weight = inputs(70, 33, dtype=dtype).detach()

    def run():
        packed = quantize(weight, quant_type=kind)
        again = PackedWeight.from_bnb_state_dict(packed.bnb_state_dict())
        return packed, again.dequantize(), again.to_bytes()

    check(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fingerprints(dtype):
    values = inputs(70, 70, dtype=dtype).detach()
    check(lambda: fingerprint(values))


def test_readable_weights():
    def run():
        module = net(use_dora=True)
        loss = F.linear(inputs(), module[0].weight).sum() + (inputs() @ module[0].weight.T).square().sum()
        (loss + module[2].weight.norm()).backward()
        return loss, module, module[0].effective_weight(), delta(module[0])

    check(run)


def test_a_step_within_a_checkpoint_of_torch_and_autocast():
    def run():
        module = net()
        x = inputs()
        with torch.autocast("cpu", torch.bfloat16):
            loss = checkpoint(module, x, use_reentrant=False).float().square().sum()
        loss.backward()
        return loss, x.grad, module

    check(run)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed):
    stack = inputs(3, 64, 32).detach()

    def run():
        owner = nn.Module()
        owner.register_parameter("stack", nn.Parameter(stack.clone(), requires_grad=False))
        experts = QLoRAExperts.from_parameter(
            ExpertParameter(owner, "stack", 3, transposed), QLoRAConfig(**SMALL), "stack", None, "stack"
        )
        experts.lora_B.data.add_(0.01)
        read = experts.weight[1]
        loss = experts.effective_weight().square().sum() + read.sum()
        loss.backward()
        return loss, owner

    check(run)


@pytest.mark.parametrize("quantized", [False, True], ids=["frozen", "4-bit"])
def test_deferred_logits(quantized):
    labels = torch.arange(5)

    def run():
        head = net()[0] if quantized else nn.Linear(64, 97, device="cpu", dtype=F32).requires_grad_(False)
        defer_logits(head)
        hidden = inputs()
        loss = F.cross_entropy(head(hidden), labels)
        loss.backward()
        return loss, hidden.grad, head

    check(run)


@pytest.mark.parametrize("kind", [pytest.param(PagedAdamW, marks=TORCH_NAMES_DEVICES), PagedAdamW8bit])
def test_paged_optimizers(kind):
    def run():
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
        state = optimizer.state_dict()["state"].values()
        return params, [each | {"step": float(each["step"])} for each in state]  # torch's AdamW has the default type

    check(run)


@pytest.mark.parametrize("use_dora", [False, True])
def test_loraplus_groups_and_state_dicts(use_dora, tmp_path):
    def run():
        module = net(use_dora=use_dora)
        module.load_state_dict(net(use_dora=use_dora).state_dict())
        save_adapter(module, tmp_path / "adapter")
        load_adapter(module, tmp_path / "adapter")
        return (
            [len(group["params"]) for group in loraplus_groups(module, lr=1e-3)],
            module,
            net(adapter=str(tmp_path / "adapter"), use_dora=use_dora),
        )

    check(run)


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_merge(dtype):
    def run():
        module = net(use_dora=True)
        merge(module, dtype=dtype)
        return module

    check(run)


def test_estimate_memory():
    pytest.importorskip("transformers")
    llama = toy("llama")

    def run():
        example = inputs()
        dense = nn.Sequential(nn.Linear(64, 64, device="cpu", dtype=F32))
        return (
            estimate_memory(dense, example=example, **SMALL),
            estimate_memory(llama, 2, 12, optimizer="adamw8bit", use_dora=True, **SMALL),
            estimate_memory(llama.config, 2, 12, gradient_checkpointing=True, **SMALL),
        )

    check(run)


@TORCH_NAMES_DEVICES
def test_doctor():
    def run():
        checks = list(doctor.examine())
        assert all(good for _, _, good in checks), checks
        return [text.partition(";")[0] for _, text, _ in checks]  # the rest is seconds

    check(run)


# A DataLoader, a Trainer and from_pretrained fail under torch.device("meta") without this package too.


def fit(trainer, module, path, **arguments):
    """Fit, validate and save; then resume from the checkpoint in another module: all that was computed."""
    first = trainer(plugins=QLoRAPrecision(**{**SMALL, **arguments}), max_epochs=1, num_sanity_val_steps=1)
    lit = module()
    first.fit(lit, loader(), loader())
    first.save_checkpoint(path)
    metrics = first.validate(lit, loader(), verbose=False)
    second = trainer(plugins=QLoRAPrecision(**{**SMALL, **arguments}), max_epochs=2)
    resumed = module()
    second.fit(resumed, loader(), ckpt_path=path)
    return lit, lit.losses, metrics, resumed, resumed.losses, first.predict(lit, loader())


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_dora": True},
        {"checkpoint": "full"},
        {"init_lora_weights": "calibrated"},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_the_trainer(arguments, trainer, tmp_path):
    check(lambda: fit(trainer, Classifier, tmp_path / "a.ckpt", **arguments), PackageElsewhere)
    check(lambda: load_from_checkpoint(Classifier, tmp_path / "a.ckpt"), PackageElsewhere)


class Optimized(Classifier):
    def configure_optimizers(self):
        return PagedAdamW8bit(loraplus_groups(self, lr=1e-2))


def test_the_trainer_with_a_paged_optimizer(trainer, tmp_path):
    def run():
        lit = Optimized()
        trainer(plugins=QLoRAPrecision(**SMALL), callbacks=PagedOptimizer()).fit(lit, loader())
        return lit, lit.losses

    check(run, PackageElsewhere)
    check(lambda: fit(trainer, Optimized, tmp_path / "a.ckpt"), PackageElsewhere)


def test_fabric(tmp_path):
    def run():
        launched, plugin = fabric.launch(lora_dropout=0.3)
        model, optimizer = fabric.setup(launched, Classifier(dropout=0.1))
        losses = fabric.train(launched, model, optimizer, list(loader()))
        state = {"model": model, "optimizer": optimizer, "qlora": plugin}
        launched.save(tmp_path / "a.ckpt", state)
        launched.load(tmp_path / "a.ckpt", state)
        return losses, fabric.train(launched, model, optimizer, list(loader())), model

    check(run, PackageElsewhere)


class InConfigureModel(LightningModule):
    """Loads a folder where Lightning's documentation has it for large models."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.model = None

    def configure_model(self):
        import transformers

        if self.model is None:
            self.model = transformers.LlamaForCausalLM.from_pretrained(self.folder)

    training_step = Lit.training_step
    train_dataloader = Lit.train_dataloader
    configure_optimizers = Lit.configure_optimizers


@pytest.mark.parametrize(
    "arguments", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "calibrated"}], ids=str
)
def test_configure_model(arguments, trainer, tmp_path):
    pytest.importorskip("transformers", minversion="5")
    toy("llama").save_pretrained(tmp_path / "base")

    def run():
        lit = InConfigureModel(tmp_path / "base")
        trainer(plugins=QLoRAPrecision(**{**SMALL, **arguments}), max_steps=2).fit(lit)
        return lit

    check(run, PackageElsewhere)


@TORCH_NAMES_DEVICES
def test_a_whole_model_under_the_default_device():
    pytest.importorskip("transformers")
    model = toy("llama")
    tokens = ids()

    def run():
        module = copy.deepcopy(model)
        convert(module, gradient_checkpointing=True, **SMALL)
        module.train()
        loss = module(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss, module

    check(run, PackageElsewhere)


# What takes a device= and is not named here must be given one.
FACTORIES = {function.__name__ for function in _device_constructors()} | {"Generator"}
ALLOWED = {
    # file, line of code: why
    ("kernels/scratch.py", "torch.zeros if zero else torch.empty"): "called with a device in the next lines",
}


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
    used = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for line, text in calls_without_device(path.read_text()):
            assert (name, text) in ALLOWED, (
                f"{name}:{line}: {text}: pass device=, or it is on the user's default device"
            )
            used.add((name, text))
    assert used == set(ALLOWED)


def test_every_tensor_of_the_package_is_made_with_a_type():
    texts = {text for path in PACKAGE.rglob("*.py") for text in calls_without_dtype(path.read_text())}
    assert texts == ANY_TYPE and calls_without_dtype("x = f(torch.ones(3, device='cpu'), torch.arange(3))")


@pytest.mark.parametrize(
    "line",
    [
        "torch.zeros(3)",
        "torch.tensor([1], dtype=torch.uint8)",
        "f(torch.arange(3))",
        "make = torch.ones",
        "torch.Generator()",
        "nn.Linear(3, 3)",
        "from torch import zeros",
        "torch.as_tensor(x)",
        "torch.randperm(3)",
    ],
)
def test_a_tensor_without_a_device_is_found(line):
    assert len(calls_without_device(line)) == 1


@pytest.mark.parametrize(
    "line",
    ["torch.zeros(3, device=x.device)", "torch.Generator('cpu')", "g: torch.Generator", "tl.zeros(3)", "nn.GELU()"],
)
def test_a_tensor_with_a_device_is_not(line):
    assert calls_without_device(line) == []
