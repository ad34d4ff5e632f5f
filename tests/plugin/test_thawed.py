"""Modules that unfreeze before their first step: what trains then, and what is said."""

import pytest
import torch
from torch import nn

from lightning_qlora import QLoRAPrecision
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.plugin.audit import THAWED
from tests.conftest import Classifier, loader
from tests.toys import pretrain

ARGUMENTS = {"r": 4, "lora_dropout": 0.0}


class Unfreezes(Classifier):
    def __init__(self, unfreeze):
        super().__init__()
        pretrain(self)
        self.unfreeze_now = unfreeze

    def configure_optimizers(self):
        self.unfreeze_now(self)
        return super().configure_optimizers()


def one_by_one(module):
    for parameter in module.parameters():
        parameter.requires_grad = True


@pytest.mark.parametrize("unfreeze", [Classifier.unfreeze, nn.Module.requires_grad_, one_by_one])
def test_what_conversion_froze_and_the_module_thaws_is_named_once(unfreeze, trainer, capsys):
    module = Unfreezes(unfreeze)
    plugin = QLoRAPrecision(**ARGUMENTS, target_modules=["0"], modules_to_save=["4"])
    trainer(plugins=plugin, max_epochs=3).fit(module, loader())
    assert plugin.report.notes == {THAWED: ["net.0.bias", "net.2.weight", "net.2.bias"]}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "requires_grad only" in line]
    assert line == f"QLoRA: net.*.bias (x2), net.2.weight: {THAWED}."
    layer = adapted_layers(module)["net.0"]
    assert not {"packed", "absmax", "nested"} & {name for name, _ in layer.named_parameters()}


def test_what_thaws_after_an_epoch_is_named(trainer):
    class ThawsLater(Classifier):
        def on_train_epoch_start(self):
            self.net[2].requires_grad_(self.current_epoch > 0)

    module = ThawsLater()
    pretrain(module)
    plugin = QLoRAPrecision(**ARGUMENTS, target_modules=["0"], modules_to_save=["4"])
    run = trainer(plugins=plugin, max_epochs=2)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters())
    run.fit(module, loader())
    assert plugin.report.notes == {THAWED: ["net.2.weight", "net.2.bias"]}


def test_adapters_alone_may_be_frozen_and_thawed_without_a_word(trainer):
    def only_adapters(module):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in name)

    plugin = QLoRAPrecision(**ARGUMENTS)
    trainer(plugins=plugin, max_epochs=2).fit(Unfreezes(only_adapters), loader())
    assert plugin.report.notes == {}
