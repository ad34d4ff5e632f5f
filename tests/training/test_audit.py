import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule
from torch import nn

from lightning_qlora import QLoRAPrecision, convert
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.training import audit
from lightning_qlora.training.audit import READ, UNUSED, adapters_without_gradient, audit_first_step


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read, self.lost, self.pooler, self.never = (nn.Linear(64, 64) for _ in range(5))

    def forward(self, x):
        y = self.called(x)
        y = F.linear(y, self.read.weight)
        with torch.no_grad():
            constant = x @ (self.lost.weight * 2)
        y = y + constant
        self.pooler(y)
        return y.square().mean()


def stepped():
    model = Model()
    convert(model, r=2, lora_dropout=0.0)
    model(torch.randn(3, 64)).backward()
    return model, adapted_layers(model)


def test_each_adapter_without_a_gradient_is_named_with_the_reason():
    _, layers = stepped()
    assert adapters_without_gradient(layers) == {"lost": READ, "pooler": UNUSED, "never": UNUSED}


def optimizer_of(*modules):
    return torch.optim.SGD([p for module in modules for p in module.parameters() if p.requires_grad], lr=0.1)


def test_a_weight_that_is_read_without_a_gradient_is_a_warning_and_unused_layers_are_printed_once(capsys):
    model, _ = stepped()
    optimizer, found = optimizer_of(model), {}
    with pytest.warns(UserWarning, match=r"1 layers got no gradient.*lost.*exclude_modules"):
        audit_first_step(optimizer, model, found)
    printed = capsys.readouterr().out
    assert "2 adapters got no gradient in the first step: pooler, never." in printed
    assert "ddp" not in printed
    assert found == {"lost": READ, "pooler": UNUSED, "never": UNUSED}
    audit_first_step(optimizer, model, found)
    audit_first_step(optimizer_of(model), model, found)  # of a second run
    assert capsys.readouterr().out == ""


def test_with_several_processes_the_message_names_the_strategy(capsys, monkeypatch):
    monkeypatch.setattr(audit, "world_size", lambda: 2)
    model, _ = stepped()
    with pytest.warns(UserWarning, match="lost"):
        audit_first_step(optimizer_of(model), model, {})
    assert "ddp_find_unused_parameters_true" in capsys.readouterr().out


def test_other_ranks_say_nothing(capsys, monkeypatch, recwarn):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    model, _ = stepped()
    audit_first_step(optimizer_of(model), model, {})
    assert capsys.readouterr().out == "" and not recwarn.list


def test_nothing_is_said_before_a_backward_pass_or_where_all_train(capsys, recwarn):
    model, layers = stepped()
    model.zero_grad(set_to_none=True)
    optimizer, found = optimizer_of(model), {}
    audit_first_step(optimizer, model, found)
    torch.stack([p.sum() for layer in layers.values() for p in layer.adapter_parameters()]).sum().backward()
    audit_first_step(optimizer, model, found)
    assert found == {} and capsys.readouterr().out == "" and not recwarn.list


def test_only_the_adapters_of_the_optimizer_that_steps_are_judged():
    model, found = Model(), {}
    convert(model, r=2, lora_dropout=0.0)
    model.read.lora_A.requires_grad_(False)
    model.read.lora_B.requires_grad_(False)
    model.called(torch.randn(3, 64)).square().mean().backward()
    audit_first_step(optimizer_of(model.called, model.read), model, found)
    assert found == {}
    audit_first_step(optimizer_of(model.never), model, found)
    assert found == {}  # none of its parameters has a gradient yet
    audit_first_step(optimizer_of(model.called, model.never), model, found)
    assert found == {"never": UNUSED}


def test_names_that_differ_by_numbers_are_one_group(capsys):
    model = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(64, 64) for _ in range(5)), "out": nn.Linear(64, 64)})
    convert(model, r=2)
    model["out"](model["experts"][3](torch.randn(2, 64))).sum().backward()
    audit_first_step(optimizer_of(model), model, {})
    assert "4 adapters got no gradient in the first step: experts.* (x4)." in capsys.readouterr().out


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Model()

    def training_step(self, batch, batch_idx):
        return self.model(batch)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, 64), batch_size=2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


EXPECTED = {"model.lost": READ, "model.pooler": UNUSED, "model.never": UNUSED}


@pytest.mark.filterwarnings("ignore:init_lora_weights='calibrated'")
@pytest.mark.parametrize("arguments", [{}, {"init_lora_weights": "calibrated"}, {"use_dora": True}])
def test_the_trainer_runs_it_once_and_the_report_has_the_names(arguments, trainer, capsys):
    plugin, lit = QLoRAPrecision(r=2, **arguments), Lit()
    with pytest.warns(UserWarning, match=r"model\.lost"):
        trainer(plugins=plugin, max_epochs=2, accumulate_grad_batches=2).fit(lit)
    printed = capsys.readouterr().out
    assert printed.count("got no gradient") == 1 and UNUSED not in str(plugin.report)
    assert plugin.report.unused == EXPECTED
    with warnings.catch_warnings(record=True) as seen:
        trainer(plugins=plugin, max_epochs=1).fit(lit)
    assert "got no gradient" not in capsys.readouterr().out + "".join(str(one.message) for one in seen)


def test_fabric_runs_it(capsys):
    fabric = Fabric(accelerator="cpu", devices=1, plugins=QLoRAPrecision(r=2))
    fabric.launch()
    model = fabric.setup_module(Model())
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        with pytest.warns(UserWarning, match="lost") if _ == 0 else warnings.catch_warnings():
            fabric.backward(model(torch.randn(2, 64)))
            optimizer.step()
            optimizer.zero_grad()
    assert capsys.readouterr().out.count("got no gradient in the first step: pooler, never.") == 1


class Gan(LightningModule):
    """Two optimizers, each stepped by a loss that the adapters of the other one may have no part in."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(2))

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            fake = self.generator(batch)
            of_critic = optimizer is self.optimizers()[1]
            loss = self.critic(fake.detach() if of_critic else fake).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    train_dataloader = Lit.train_dataloader

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.critic)]


def test_a_gan_with_two_optimizers_has_no_unused_adapters(trainer, capsys):
    plugin = QLoRAPrecision(r=2)
    trainer(plugins=plugin, max_steps=4).fit(Gan())
    assert plugin.report.unused == {} and "got no gradient" not in capsys.readouterr().out


def test_a_loss_without_a_gradient_says_what_to_do(trainer):
    class Reversible(LightningModule):
        """As Reformer: layers inside an autograd.Function whose input comes from a frozen embedding."""

        def __init__(self, ask_for_gradients):
            super().__init__()
            self.embedding, self.layer = nn.Embedding(8, 64), nn.Linear(64, 64)
            if ask_for_gradients:  # as enable_input_require_grads
                self.embedding.register_forward_hook(lambda _, __, y: y.requires_grad_())

        def training_step(self, batch, _):
            x = self.embedding(torch.arange(8))
            return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=True).square().mean()

        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(2))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(module):
        trainer(plugins=QLoRAPrecision(r=2), max_steps=1, enable_checkpointing=False).fit(module)

    with pytest.raises(RuntimeError, match=r"loss needs no gradient.*enable_input_require_grads\(\)"):
        fit(Reversible(ask_for_gradients=False))
    fit(module := Reversible(ask_for_gradients=True))
    assert module.layer.lora_B.any()
