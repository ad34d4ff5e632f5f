"""The optimizers of a run: one made before conversion gets the adapters, and each is checked before its first step."""

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule
from torch import nn

from lightning_qlora import ConversionReport, QLoRAPrecision, convert, quantize
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.optim.optimizer_parameters import replace_parameters_by_adapters
from lightning_qlora.plugin.audit import LOST, UNUSED, Audit
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
    return model


def optimizer_of(*modules):
    return torch.optim.SGD([p for module in modules for p in module.parameters() if p.requires_grad], lr=0.1)


REASONS = dict.fromkeys(["lost", "pooler", "never"], UNUSED)
PRINTED = f"QLoRA: 3 adapters got no gradient in the first step ({UNUSED}): lost, pooler, never.\n"


def test_layers_without_a_gradient_are_printed_once_with_the_reason(capsys, monkeypatch):
    model = stepped()
    optimizer = optimizer_of(model)
    report = ConversionReport()
    checks = Audit(report)
    checks.before_step(model, optimizer)
    assert capsys.readouterr().out == PRINTED and report.unused == REASONS
    checks.before_step(model, optimizer)
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # which says nothing
    Audit(ConversionReport()).before_step(model, optimizer)
    assert capsys.readouterr().out == ""


def test_16_bit_parameters_that_train_are_named():
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    module = nn.ParameterDict({name: torch.ones(2, dtype=dtype) for name, dtype in types.items()})
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    report = ConversionReport()
    Audit(report).before_step(module, optimizer_of(module))
    assert report.notes == {LOST: ["bf16", "fp16"]}


def test_nothing_is_said_before_a_backward_pass_or_where_all_train(capsys):
    model = stepped()
    model.zero_grad(set_to_none=True)
    optimizer = optimizer_of(model)
    report = ConversionReport()
    checks = Audit(report)
    checks.before_step(model, optimizer)
    adapters = [p.sum() for layer in adapted_layers(model).values() for p in layer.adapter_parameters()]
    torch.stack(adapters).sum().backward()
    checks.before_step(model, optimizer)
    assert report == ConversionReport() and capsys.readouterr().out == ""


def test_only_the_adapters_of_the_optimizer_that_steps_are_judged():
    model = Model()
    report = ConversionReport()
    checks = Audit(report)
    convert(model, r=2, lora_dropout=0.0)
    model.read.requires_grad_(False)
    model.called(torch.randn(3, 64)).square().mean().backward()
    held = [*model.called.parameters(), *model.read.parameters()]  # frozen ones too
    checks.before_step(model, torch.optim.SGD(held, lr=0.1))
    assert report.unused == {}
    checks.before_step(model, optimizer_of(model.never))
    assert report.unused == {}  # none of its parameters has a gradient yet
    optimizer = optimizer_of(model.called, model.never)
    for _ in range(2):
        checks.before_step(model, optimizer)
    assert report.unused == {"never": UNUSED}


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


@pytest.mark.filterwarnings("ignore:init_lora_weights='calibrated'")
@pytest.mark.parametrize("arguments", [{}, {"init_lora_weights": "calibrated"}, {"use_dora": True}])
def test_the_trainer_runs_it_once_and_the_report_has_the_names(arguments, trainer, capsys):
    plugin = QLoRAPrecision(r=2, **arguments)
    lit = Lit()
    trainer(plugins=plugin, max_epochs=2, accumulate_grad_batches=2).fit(lit)
    printed = capsys.readouterr().out
    assert printed.count("got no gradient") == 1
    assert plugin.report.rows()[1][:2] == ("model.lost", f"! no gradient in the first step: {UNUSED}")
    assert plugin.report.unused == {f"model.{name}": reason for name, reason in REASONS.items()}
    trainer(plugins=plugin, max_epochs=1).fit(lit)
    assert "got no gradient" not in capsys.readouterr().out


class Unused(nn.Module):
    """One layer of two is used in the loss."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(self.used(x))


@pytest.mark.parametrize("one_optimizer", [False, True])
def test_fabric_audits_each_of_two_modules(one_optimizer, capsys):
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
    for _ in range(2):
        fabric.backward(second(first(torch.randn(2, 64))))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    printed = capsys.readouterr().out
    assert printed.count(f"QLoRA: 1 adapters got no gradient in the first step ({UNUSED}): unused.") == 1
    assert printed.count(PRINTED) == 1
    assert printed.count("norm.weight, norm.bias: trains in full, although conversion") == 1
    assert of_first.unused == {"unused": UNUSED} and plugin.report.unused == REASONS


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

        train_dataloader = Lit.train_dataloader
        configure_optimizers = Lit.configure_optimizers

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
    other = Classifier()
    first, _, norm, _, second = module.net
    optimizer = torch.optim.AdamW(
        [
            {"params": list(second.parameters()), "lr": 1.0},
            {"params": [norm.weight, first.weight], "lr": 2.0},
            {"params": other.net[0].parameters()},
        ]
    )
    groups = list(optimizer.param_groups)
    for each in (module, other):
        convert(each, r=4, use_dora=True)
    before = [list(group["params"]) for group in groups]
    optimizer.state[before[0][0]] = {"step": torch.tensor(1.0)}
    replace_parameters_by_adapters(optimizer)
    assert [[*map(id, group["params"])] for group in groups] == [[*map(id, params)] for params in before]
    optimizer.state.clear()
    replace_parameters_by_adapters(optimizer)
    first, second = ([f"net.{i}.{name}" for name in ("lora_A", "lora_B", "lora_magnitude_vector")] for i in (0, 4))
    assert names_of(module, optimizer) == [[*second, "net.4.bias"], ["net.2.weight", *first], [None] * 4]
    assert names_of(other, optimizer)[2] == [*first, "net.0.bias"]  # of the other module, which has equal names
    assert all(now is before for now, before in zip(optimizer.param_groups, groups, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 2.0, 1e-3]


def test_names_of_named_parameters_are_replaced_too():
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(module.named_parameters())
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this torch keeps no names")
    convert(module, r=4)
    replace_parameters_by_adapters(optimizer)
    names = ["0.lora_A", "0.lora_B", "0.bias", "1.lora_A", "1.lora_B", "1.bias"]
    assert optimizer.param_groups[0]["param_names"] == names_of(module, optimizer)[0] == names


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
        lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
        lambda params: torch.optim.Adafactor(params, lr=1e-2),
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
    packed = quantize(module.net[0].weight).packed
    trainer(plugins=QLoRAPrecision(r=4, lora_dropout=0.0), max_epochs=4).fit(module, loader(32, 32))
    assert module.losses[-1] < module.losses[0] and module.net[0].lora_B.any()
    assert torch.equal(module.net[0].packed.view(-1), packed.view(-1))
