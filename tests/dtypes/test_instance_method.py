"""An object in place of a method of one module: it calls what it replaces, and everybody else sees the module."""

import copy
import inspect
import itertools
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

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
COPIES = {"itself": lambda m: m, "copy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


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
    def forward(self, x, scale=1.0, *, bias=0.0):
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


@pytest.mark.parametrize("fullgraph", [False, True])
def test_torch_compiles_and_exports_it(fullgraph):
    module = nn.Sequential(nn.Linear(4, 4), Mine())
    add(Doubled(module[0]))
    add(Shifted(module[1]))
    x = torch.randn(2, 4)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=fullgraph)
    assert torch.equal(compiled(x), module(x))
    assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))
