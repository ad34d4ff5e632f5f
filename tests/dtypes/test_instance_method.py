"""An object in place of a method of one module: it calls what it replaces, and everybody else sees the module."""

import copy
import inspect
import io
import itertools
import pickle
import typing
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_qlora import convert, merge
from lightning_qlora.dtypes.instance_method import (
    METHODS,
    InstanceMethod,
    add,
    has_other_forward,
    instance_method,
    remove,
)


class Doubled(InstanceMethod):
    def call(self, *args, **kwargs):
        return 2 * self.original(*args, **kwargs)


class Shifted(InstanceMethod):
    shift = 1.0

    def call(self, x):
        return self.original(x) + self.shift


class Negated(InstanceMethod):
    def call(self, x):
        return -self.original(x)


METHOD = {Doubled: lambda y: 2 * y, Shifted: lambda y: y + 1, Negated: lambda y: -y}


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "itself": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_methods_are_added_and_removed_in_any_order(copied):
    x = torch.randn(2, 4)
    for added in itertools.permutations(METHOD):
        for removed in itertools.permutations(METHOD):
            layer = nn.Linear(4, 4)
            for kind in added:
                add(kind(layer))
            original, layer = layer, copied(layer)
            with torch.no_grad():
                layer.weight.add_(1)  # a copy computes with its own values
            assert (copied is COPIES["itself"]) is torch.equal(layer.weight, original.weight)
            expected = nn.Linear.forward(layer, x)
            left = list(added)
            for kind in removed:
                y = expected
                for each in left:
                    y = METHOD[each](y)
                assert torch.equal(layer(x), y) and type(layer) is nn.Linear and not has_other_forward(layer)
                remove(layer, kind)
                left.remove(kind)
                assert instance_method(layer, kind) is None
            assert torch.equal(layer(x), expected) and not {"forward", METHODS} & vars(layer).keys()


class Mine(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0, *, bias: float = 0.0) -> Tensor:
        """Scale and shift."""
        return x * scale + bias


def test_it_calls_the_class_as_it_is_at_the_time_of_the_call(monkeypatch):
    module = Mine()
    add(Doubled(module))
    x = torch.ones(2)
    assert torch.equal(module(x, 3.0, bias=1.0), torch.full((2,), 8.0))
    monkeypatch.setattr(Mine, "forward", lambda self, x: x + 10)
    assert torch.equal(module(x), torch.full((2,), 22.0))


def test_it_respects_a_forward_of_other_code_below_and_above_it():
    module = Mine()
    module.forward = lambda x: x + 1  # as accelerate does
    assert has_other_forward(module)
    add(Doubled(module))
    assert module(torch.ones(())) == 4 and has_other_forward(module)
    ours = module.forward
    module.forward = lambda x: ours(x) + 100
    assert module(torch.ones(())) == 104
    remove(module, Doubled)  # the other code still calls it
    assert module(torch.ones(())) == 102 and METHODS not in vars(module)


@pytest.mark.parametrize("kinds", [[Doubled], [Doubled, Negated]])
def test_others_see_the_method_of_the_class(kinds):
    class Lit(pl.LightningModule):
        def training_step(self, batch, batch_idx):
            return batch * batch_idx

    lit = Lit()
    plain = Lit()
    for kind in kinds:
        add(kind(lit, "training_step"))
    assert inspect.signature(lit.training_step) == inspect.signature(plain.training_step)
    assert is_overridden("training_step", lit) and not is_overridden("validation_step", lit)
    assert is_param_in_hook_signature(lit.training_step, "batch_idx", min_args=2)
    assert not is_param_in_hook_signature(lit.training_step, "dataloader_iter", explicit=True)


@pytest.mark.parametrize("kinds", [[Doubled], [Doubled, Negated]])
def test_it_has_the_signature_and_the_type_hints_of_what_it_replaces(kinds):
    for forward in (None, lambda x, factor=2: x * factor):
        module = Mine()
        plain = Mine()
        for each in (module, plain):
            if forward is not None:
                each.forward = forward
        for kind in kinds:
            add(kind(module))
        assert inspect.signature(module.forward) == inspect.signature(plain.forward)
        assert typing.get_type_hints(module.forward) == typing.get_type_hints(plain.forward)


class CopiesItself(Mine):
    """Copies that do not ask `__reduce_ex__` first."""

    def __init__(self):
        super().__init__()
        self.values = [1.0]

    def __deepcopy__(self, memo):
        new = type(self)()
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new


class WithState(CopiesItself):
    def __getstate__(self):
        return {**vars(self), "values": None}


@pytest.mark.parametrize("kind", [CopiesItself, WithState])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_classes_with_copies_of_their_own(kind, copied):
    module = kind()
    add(Doubled(module))
    again = copied(module)
    assert again.forward.module is again and again(torch.ones(())) == 2
    assert again.values == ([1.0] if kind is CopiesItself or copied is copy.deepcopy else None)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_torch_compiles_and_exports_it(fullgraph):
    module = nn.Sequential(nn.Linear(4, 4), Mine())
    add(Doubled(module[0]))
    add(Shifted(module[1]))
    x = torch.randn(2, 4)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=fullgraph)
    assert torch.equal(compiled(x), module(x))
    assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))


class Block(nn.Module):
    """Its graph breaks between two parts of which one trains in full."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        h = self.norm(x)
        torch._dynamo.graph_break()
        return x + self.linear(h)


class In16Bits(nn.Module):
    """Blocks, and a head that trains in full; it breaks its graph too."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(64, 8)
        self.bfloat16()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        torch._dynamo.graph_break()
        return self.head(x)


def in_16_bits(**arguments):
    torch.manual_seed(0)
    module = In16Bits()
    convert(module, r=4, lora_dropout=0.0, modules_to_save=["norm", "head"], **arguments)
    return module


def results(module, x):
    """Output and gradients, and the output without gradients."""
    module.zero_grad()
    y = module(x)
    y.float().square().sum().backward()
    with torch.no_grad():
        return [y.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None), module(x)]


def compiled_forward(module, **how):
    module.forward = torch.compile(module.forward, **how)
    return module


def compiled_in_place(module, **how):
    module.compile(**how)
    return module


COMPILED = {"module": torch.compile, "in place": compiled_in_place, "forward": compiled_forward}


@pytest.mark.parametrize(
    ("how", "setting"),
    [
        ("module", False),
        ("in place", True),
        ("forward", "auto"),
        *(pytest.param("module", setting, marks=pytest.mark.slow) for setting in (True, "auto")),
    ],
)
def test_graphs_break_beside_what_trains_in_full(how, setting):
    torch._dynamo.reset()
    module = in_16_bits(gradient_checkpointing=setting)
    x = torch.randn(4, 64).bfloat16()
    expected = results(module, x)
    module = COMPILED[how](module, backend="eager")
    for training in (True, False):
        module.train(training)
        torch.testing.assert_close(results(module, x), expected, rtol=0.02, atol=0.02)


def test_a_compiled_forward_computes_after_merge():
    torch._dynamo.reset()
    x = torch.randn(4, 64).bfloat16()
    module = compiled_forward(in_16_bits(), backend="eager")
    expected = module(x)
    merge(module)
    assert module.head.weight.dtype is torch.bfloat16
    torch.testing.assert_close(module(x), expected, rtol=0.02, atol=0.02)


def test_accelerate_prepares_and_unwraps_a_converted_module(monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    from accelerate.state import AcceleratorState

    x = torch.randn(4, 64).bfloat16()
    for keeps_wrapper in (True, False):
        module = in_16_bits()
        expected = module(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            AcceleratorState._reset_state(True)
            accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
            prepared = accelerator.prepare(module)
        torch.testing.assert_close(prepared(x), expected.float())
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keeps_wrapper)
        assert unwrapped is module
        torch.testing.assert_close(unwrapped(x).bfloat16(), expected)
