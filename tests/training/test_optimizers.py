"""The optimizers of a run: one made before conversion gets the adapters, and each is checked before its first step."""

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
from lightning_qlora.training.audit import READ, UNUSED, Audit, adapters_without_gradient
from lightning_qlora.training.optimizers import replace_parameters_by_adapters
from tests.conftest import Classifier, loader


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
    optimizer = optimizer_of(model)
    found = {}
    checks = Audit(found)
    with pytest.warns(UserWarning, match=r"1 layers got no gradient.*lost.*exclude_modules"):
        checks.before_step(model, optimizer)
    printed = capsys.readouterr().out
    assert "2 adapters got no gradient in the first step: pooler, never." in printed
    assert "ddp" not in printed
    assert found == {"lost": READ, "pooler": UNUSED, "never": UNUSED}
    checks.before_step(model, optimizer)
    checks.before_step(model, optimizer_of(model))  # of a second run
    assert capsys.readouterr().out == ""


def test_with_several_processes_the_message_names_the_strategy(capsys, monkeypatch):
    monkeypatch.setattr(audit, "world_size", lambda: 2)
    model, _ = stepped()
    with pytest.warns(UserWarning, match="lost"):
        Audit({}).before_step(model, optimizer_of(model))
    assert "ddp_find_unused_parameters_true" in capsys.readouterr().out


def test_other_ranks_say_nothing(capsys, monkeypatch, recwarn):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    model, _ = stepped()
    Audit({}).before_step(model, optimizer_of(model))
    assert capsys.readouterr().out == "" and not recwarn.list


def test_nothing_is_said_before_a_backward_pass_or_where_all_train(capsys, recwarn):
    model, layers = stepped()
    model.zero_grad(set_to_none=True)
    optimizer = optimizer_of(model)
    found = {}
    checks = Audit(found)
    checks.before_step(model, optimizer)
    torch.stack([p.sum() for layer in layers.values() for p in layer.adapter_parameters()]).sum().backward()
    checks.before_step(model, optimizer)
    assert found == {} and capsys.readouterr().out == "" and not recwarn.list


def test_only_the_adapters_of_the_optimizer_that_steps_are_judged():
    model = Model()
    found = {}
    checks = Audit(found)
    convert(model, r=2, lora_dropout=0.0)
    model.read.lora_A.requires_grad_(False)
    model.read.lora_B.requires_grad_(False)
    model.called(torch.randn(3, 64)).square().mean().backward()
    checks.before_step(model, optimizer_of(model.called, model.read))
    assert found == {}
    checks.before_step(model, optimizer_of(model.never))
    assert found == {}  # none of its parameters has a gradient yet
    checks.before_step(model, optimizer_of(model.called, model.never))
    assert found == {"never": UNUSED}


def test_names_that_differ_by_numbers_are_one_group(capsys):
    model = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(64, 64) for _ in range(5)), "out": nn.Linear(64, 64)})
    convert(model, r=2)
    model["out"](model["experts"][3](torch.randn(2, 64))).sum().backward()
    Audit({}).before_step(model, optimizer_of(model))
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
    plugin = QLoRAPrecision(r=2, **arguments)
    lit = Lit()
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


class Unused(nn.Module):
    """One layer of two is used in the loss."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(self.used(x))


@pytest.mark.parametrize("one_optimizer", [False, True])
def test_fabric_audits_each_of_two_modules(one_optimizer, capsys, recwarn):
    plugin = QLoRAPrecision(r=2)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)
    generator, critic = Unused(), Model()
    critic.norm = nn.LayerNorm(64)
    first = fabric.setup_module(generator)
    of_first = plugin.report
    second = fabric.setup_module(critic)
    generator.norm.requires_grad_(True)  # conversion froze it
    both = list(first.parameters()), list(second.parameters())
    groups = [[*both[0], *both[1]]] if one_optimizer else both
    optimizers = [fabric.setup_optimizers(torch.optim.SGD(group, lr=0.1)) for group in groups]
    recwarn.clear()
    for _ in range(2):
        fabric.backward(second(first(torch.randn(2, 64))))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    printed = capsys.readouterr().out
    assert printed.count("QLoRA: 1 adapters got no gradient in the first step: unused.") == 1
    assert printed.count("QLoRA: 2 adapters got no gradient in the first step: pooler, never.") == 1
    texts = [str(each.message) for each in recwarn]
    assert sum("frozen by conversion train from now on, in full: norm.weight, norm.bias" in text for text in texts) == 1
    assert sum("The adapters of 1 layers got no gradient, so they do not train: lost" in text for text in texts) == 1
    assert of_first.unused == {"unused": UNUSED}
    assert plugin.report.unused == {"lost": READ, "pooler": UNUSED, "never": UNUSED}


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
            self.embedding = nn.Embedding(8, 64)
            self.layer = nn.Linear(64, 64)
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


def names_of(module, optimizer):
    name_of = {id(param): name for name, param in module.named_parameters()}
    return [[name_of.get(id(param)) for param in group["params"]] for group in optimizer.param_groups]


def test_each_adapter_replaces_its_weight_in_the_same_group():
    module = Classifier()
    first = module.net[0]
    second = module.net[4]
    optimizer = torch.optim.AdamW(
        [{"params": list(second.parameters()), "lr": 1.0}, {"params": [module.net[2].weight, first.weight], "lr": 2.0}]
    )
    groups = list(optimizer.param_groups)
    convert(module, r=4, use_dora=True)
    replace_parameters_by_adapters(optimizer)
    assert names_of(module, optimizer) == [
        ["net.4.lora_A", "net.4.lora_B", "net.4.lora_magnitude_vector", "net.4.bias"],
        ["net.2.weight", "net.0.lora_A", "net.0.lora_B", "net.0.lora_magnitude_vector"],
    ]
    assert all(now is before for now, before in zip(optimizer.param_groups, groups, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 2.0]


def test_names_of_named_parameters_are_replaced_too():
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(module.named_parameters())
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this torch keeps no names")
    convert(module, r=4)
    replace_parameters_by_adapters(optimizer)
    assert [optimizer.param_groups[0]["param_names"]] == names_of(module, optimizer)
    assert "0.lora_A" in optimizer.param_groups[0]["param_names"]


def test_an_optimizer_of_two_modules_with_equal_names_gets_the_adapters_of_both():
    module = Classifier()
    other = Classifier()
    optimizer = torch.optim.AdamW([{"params": module.parameters()}, {"params": other.parameters()}])
    convert(module, r=4)
    convert(other, r=4)
    replace_parameters_by_adapters(optimizer)
    for group, owner in zip(optimizer.param_groups, (module, other), strict=True):
        trained = {id(p) for p in owner.parameters() if p.requires_grad}
        assert trained and trained <= {id(p) for p in group["params"]}


def test_an_optimizer_with_state_is_not_changed():
    module = Classifier()
    optimizer = torch.optim.AdamW(module.parameters())
    convert(module, r=4)
    before = list(optimizer.param_groups[0]["params"])
    optimizer.state[before[0]] = {"step": torch.tensor(1.0)}
    replace_parameters_by_adapters(optimizer)
    assert all(now is was for now, was in zip(optimizer.param_groups[0]["params"], before, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1),
        lambda params: torch.optim.AdamW(params, lr=1e-2),
        lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=4),
    ],
)
def test_an_optimizer_made_in_init_trains_the_adapters(trainer, make):
    class Early(Classifier):
        def __init__(self):
            super().__init__()
            self.early = make(self.parameters())

        def configure_optimizers(self):
            return self.early

    module = Early()
    trainer(plugins=QLoRAPrecision(r=4, lora_dropout=0.0), max_epochs=4).fit(module, loader(32, 32))
    assert module.losses[-1] < module.losses[0]
    assert module.net[0].lora_B.abs().sum() > 0


def test_steps_in_fp32_are_not_judged(recwarn):
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    convert(module, r=4, target_modules=["0"], modules_to_save=["1"])
    module[1].weight.data.fill_(1e6)  # a step of a learning rate is lost here too
    recwarn.clear()
    module(torch.randn(4, 64)).sum().backward()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)
    Audit({}).before_step(module, optimizer)
    assert not recwarn.list
