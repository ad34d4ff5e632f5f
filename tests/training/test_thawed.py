"""Modules that unfreeze: what trains then, and what is said."""

import warnings

import pytest
import torch
from torch import nn

from lightning_qlora import QLoRAPrecision
from lightning_qlora.layers.qlora_linear import adapted_layers
from tests.conftest import Classifier, loader

ARGUMENTS = {"r": 4, "lora_dropout": 0.0}


class Unfreezes(Classifier):
    """Calls `unfreeze` at the start of its second epoch."""

    def __init__(self, unfreeze):
        super().__init__()
        self.unfreeze_now = unfreeze

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.unfreeze_now(self)


def one_by_one(module):
    for parameter in module.parameters():
        parameter.requires_grad = True


@pytest.mark.parametrize("unfreeze", [Classifier.unfreeze, nn.Module.requires_grad_, one_by_one])
def test_what_conversion_froze_and_the_module_thaws_is_named_once_with_its_size(unfreeze, trainer, recwarn):
    module = Unfreezes(unfreeze)
    plugin = QLoRAPrecision(**ARGUMENTS, target_modules=["0"], modules_to_save=["4"])
    trainer(plugins=plugin, max_epochs=3).fit(module, loader())
    (text,) = [str(each.message) for each in recwarn if "requires_grad only" in str(each.message)]
    assert text.startswith(
        "3 parameters (768 bytes) that were frozen by conversion train from now on, in full: net.*.bias (x2), "
        "net.*.weight. Checkpoints hold them too. If this is meant, name their modules in modules_to_save"
    )
    layer = adapted_layers(module)["net.0"]
    assert not {"packed", "absmax", "nested"} & {name for name, _ in layer.named_parameters()}


def test_layers_that_the_module_froze_and_trains_later_are_named_with_target_modules(trainer):
    module = Unfreezes(nn.Module.requires_grad_)
    module.net[0].requires_grad_(False)
    before = module.net[0].weight.detach().clone()
    run = trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_epochs=2)
    message = (
        r"^2 parameters \(16.64 kB\) of layers that the module froze .*: net\.\*\.weight, net\.\*\.bias\. .*target_mod"
    )
    with pytest.warns(UserWarning, match=message):
        run.fit(module, loader())
    assert type(module.net[0]) is nn.Linear and not torch.equal(module.net[0].weight, before)


def test_adapters_alone_may_be_frozen_and_thawed_without_a_word(trainer):
    def only_adapters(module):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in name)

    run = trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*requires_grad only")
        run.fit(Unfreezes(only_adapters), loader())
