"""Modules that unfreeze: what trains then, and what is said."""

import warnings

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_qlora import QLoRAPrecision
from lightning_qlora.layers.qlora_linear import adapted_layers
from tests.conftest import Classifier, loader

ARGUMENTS = {"r": 4, "lora_dropout": 0.0}


class Unfreezes(Classifier):
    """Calls `unfreeze` at the start of an epoch."""

    def __init__(self, epoch, unfreeze):
        super().__init__()
        self.epoch = epoch
        self.unfreeze_now = unfreeze

    def on_train_epoch_start(self):
        if self.current_epoch == self.epoch:
            self.unfreeze_now(self)


def all_at_once(module):
    module.requires_grad_(True)


def one_by_one(module):
    for parameter in module.parameters():
        parameter.requires_grad = True


WAYS = {"unfreeze": lambda module: module.unfreeze(), "requires_grad_": all_at_once, "loop": one_by_one}


@pytest.mark.parametrize("unfreeze", WAYS.values(), ids=WAYS)
def test_what_conversion_froze_and_the_module_thaws_is_named_once_with_its_size(unfreeze, trainer):
    module = Unfreezes(1, unfreeze)
    run = trainer(plugins=QLoRAPrecision(**ARGUMENTS, target_modules=["0"], modules_to_save=["4"]), max_epochs=3)
    with pytest.warns(UserWarning, match="requires_grad only") as caught:
        run.fit(module, loader())
    texts = [str(warning.message) for warning in caught if "requires_grad only" in str(warning.message)]
    assert len(texts) == 1
    assert texts[0].startswith("3 parameters (768 bytes) that were frozen by conversion train from now on, in full: ")
    assert all(name in texts[0] for name in ("net.*.bias", "net.*.weight", "modules_to_save"))
    layer = adapted_layers(module)["net.0"]
    assert not {"packed", "absmax", "nested"} & {name for name, _ in layer.named_parameters()}


def test_layers_that_the_module_froze_and_trains_later_are_named_with_target_modules(trainer):
    module = Unfreezes(1, all_at_once)
    module.net[0].requires_grad_(False)
    before = module.net[0].weight.detach().clone()
    run = trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_epochs=2)
    with pytest.warns(
        UserWarning, match=r"layers that the module froze before conversion train.*net\.\*\..*target_mod"
    ):
        run.fit(module, loader())
    assert type(module.net[0]) is nn.Linear and not torch.equal(module.net[0].weight, before)


def test_adapters_alone_may_be_frozen_and_thawed_without_a_word(trainer):
    def only_adapters(module):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in name)

    run = trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*requires_grad only")
        run.fit(Unfreezes(1, only_adapters), loader())


def test_fabric_says_it_too():
    fabric = Fabric(accelerator="cpu", devices=1, plugins=QLoRAPrecision(**ARGUMENTS))
    net = fabric.setup_module(Classifier().net)
    net.requires_grad_(True)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(net.parameters(), lr=0.1))
    fabric.backward(net(torch.randn(4, 64)).sum())
    with pytest.warns(UserWarning, match="that were frozen by conversion train from now on"):
        optimizer.step()
