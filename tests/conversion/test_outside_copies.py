"""Copies of the weights outside of the module, from before conversion: averages, references, targets."""

import copy
import re
import sys
import weakref

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.pytorch import Callback
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from lightning_qlora import QLoRAPrecision, convert
from lightning_qlora.conversion import outside_copies
from lightning_qlora.conversion.outside_copies import COMPUTED, FAILED, OF_CONVERTED, WRITTEN
from tests.conftest import leaves_for_users, make_trainer, variables_for_users
from tests.toys import pretrain

ARGUMENTS = {"r": 4, "lora_dropout": 0.0}


@pytest.fixture(autouse=True)
def _search_as_for_users(monkeypatch):
    monkeypatch.setattr(outside_copies, "LEAVES", leaves_for_users)
    monkeypatch.setattr(outside_copies, "_variables", variables_for_users)


def body(seed=None):
    seed = int(torch.randint(1 << 20, ())) if seed is None else seed
    return pretrain(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64)), seed)


class EMA:
    """An average in a list of tensors, as torch_ema."""

    def __init__(self, net):
        self.shadow = [parameter.detach().clone() for parameter in net.parameters()]


class ByName:
    """Averages what has the same name in both, as code that allows missing keys; no error shows that it is wrong."""

    def __init__(self, net):
        self.net = copy.deepcopy(net)

    @torch.no_grad()
    def update(self, net):
        own = dict(net.named_parameters())
        for name, parameter in self.net.named_parameters():
            if name in own:
                parameter.lerp_(own[name], 0.5)


class OfWeights(ByName):
    """Reads `layer.weight`, which is W + s B A, so that it is right."""

    @torch.no_grad()
    def update(self, net):
        for ours, theirs in zip(self.net, net, strict=True):
            if hasattr(ours, "weight"):
                ours.weight.lerp_(theirs.weight, 0.5)
                ours.bias.lerp_(theirs.bias, 0.5)


class Twin(ByName):
    """A dense module that trains beside the converted one."""

    def __init__(self, net):
        super().__init__(net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)

    @torch.enable_grad()
    def update(self, _):
        self.net(torch.ones(1, 64)).sum().backward()
        self.optimizer.step()


class Reference(ByName):
    def update(self, _):
        self.net(torch.ones(1, 64))


def train(net, average, steps=3, before=True):
    """A loop of Fabric's; returns the plugin."""
    plugin = QLoRAPrecision(**ARGUMENTS)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)
    made = average(net) if before else None
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    made = made or average(net)
    for _ in range(steps):
        fabric.backward(model(torch.randn(8, 64)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(made, ByName):
            made.update(net)
    return plugin


@pytest.mark.parametrize("make", [copy.deepcopy, OfWeights, EMA])
def test_a_copy_is_found_beside_many_objects_of_other_code(make):
    """As in a notebook with data, or a process of pytest."""
    crowd = [[[number] for number in range(100)] for _ in range(2000)]
    report = train(body(), make, steps=0).report
    assert len(crowd) == 2000 and (report.copied == ["0", "3"] or report.notes)


HOLDERS = {EMA: "EMA", AveragedModel: "AveragedModel", copy.deepcopy: None}


@pytest.mark.parametrize("make", HOLDERS)
def test_a_row_names_an_average_and_the_summary_any_other_copy(make, capsys):
    report = train(body(), make, steps=0).report
    printed = capsys.readouterr().out
    if HOLDERS[make] is None:
        assert report.notes == {} and report.copied == ["0", "3"]
        assert "outside of the module are copies of * (x2), from before conversion" in printed
    else:
        ((text, names),) = report.notes.items()
        assert text.startswith(f"{HOLDERS[make]} holds a copy of it") and "in on_fit_start" in text
        assert names == [""] and report.copied == [] and "outside of the module" not in printed


def freed(net):
    """As FSDP2 keeps parameters that it gathered."""
    copied = copy.deepcopy(net)
    for parameter in copied.parameters():
        parameter.untyped_storage().resize_(0)
    return copied


@pytest.mark.parametrize("make", HOLDERS)
def test_convert_looks_for_them_too(make):
    net = body()
    held = make(net)
    if HOLDERS[make] is None:
        assert convert(net, **ARGUMENTS).copied == ["0", "3"]
    else:
        with pytest.warns(UserWarning, match=f"{HOLDERS[make]} holds a copy of it from before conversion"):
            convert(net, **ARGUMENTS)
    assert held is not None


@pytest.mark.parametrize(
    "make", [*HOLDERS, freed, lambda _: body(seed=3), lambda net: net.state_dict(), lambda net: [net[1]]]
)
def test_after_conversion_and_for_what_is_no_copy_there_is_no_row(make):
    report = train(body(), make, steps=2, before=make not in HOLDERS).report
    assert report.notes == {} and report.copied == []


class Aliased(pl.LightningModule):
    """Its `__init__` keeps weights, and its step computes with them, or clips their gradients."""

    def __init__(self, keep):
        super().__init__()
        self.net = body()
        self.kept = keep(self.net)

    def training_step(self, batch, batch_idx):
        y = self.net(batch)
        return (self.kept(y) if callable(self.kept) else y + sum(p.square().sum() for p in self.kept)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def tied(net):
    weight = net[0].weight
    return lambda y: F.linear(y, weight.T)


@pytest.mark.parametrize(
    ("keep", "layers"),
    [(lambda net: [*net.parameters()], "net.*"), (lambda net: (net[3].weight,), "net.3"), (tied, "net.0")],
)
def test_weights_that_a_list_or_a_closure_holds_are_named_and_again_with_a_gradient(keep, layers, tmp_path, capsys):
    trainer = make_trainer(tmp_path, plugins=QLoRAPrecision(**ARGUMENTS), max_steps=2)
    trainer.fit(Aliased(keep), DataLoader(torch.randn(16, 64), 8))
    printed = capsys.readouterr().out
    report = trainer.precision_plugin.report
    assert f"copies of {layers}" in printed and "or references to its weights" in printed
    assert report.notes[COMPUTED] == [f"{name}.weight" for name in report.copied]
    assert f"QLoRA: {layers}.weight" in printed and "other code computes with its weight" in printed


def test_an_optimizer_that_was_made_before_is_no_holder():
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    optimizer = torch.optim.AdamW(net.parameters())
    assert convert(net, r=4).copied == []
    del optimizer


def test_a_reference_that_nothing_computes_with_is_in_the_summary_alone():
    net = body()
    plugin = QLoRAPrecision(**ARGUMENTS)
    parameters = [*net.parameters()]  # to clip their gradients, beside an optimizer that holds them too
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)
    model, optimizer = fabric.setup(net, torch.optim.SGD(parameters, lr=0.1))
    fabric.backward(model(torch.randn(8, 64)).square().mean())
    torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
    optimizer.step()
    assert plugin.report.copied == ["0", "3"] and plugin.report.notes == {}


def test_the_row_names_the_part_and_a_copy_that_is_gone_has_none():
    net = body()
    outer = nn.ModuleDict({"net": net, "other": body()})
    EMA(outer)
    train_of = EMA(net)  # noqa: F841
    plugin = QLoRAPrecision(**ARGUMENTS)
    Fabric(accelerator="cpu", devices=1, plugins=plugin).setup_module(outer)
    assert [*plugin.report.notes.values()] == [["net"]]


def in_a_closure(net):
    copied = copy.deepcopy(net)
    return lambda: copied


def in_lists_of_lists(net):
    return [{"a": [*copy.deepcopy(net)]}, [], 3]


kept = []  # by the module


def in_a_global(net):
    kept[:] = [copy.deepcopy(net)]


@pytest.mark.parametrize("make", [in_a_closure, in_lists_of_lists, in_a_global])
def test_a_copy_is_found_in_whatever_running_code_reaches(make):
    assert train(body(), make, steps=0).report.copied == ["0", "3"]
    kept.clear()


def test_the_search_keeps_no_variable_and_changes_no_dict_of_them():
    net, data = body(), body()
    alive = weakref.ref(data)
    train(net, lambda _: None, steps=0)
    del data
    assert alive() is None
    net, data = body(), body()
    variables = locals()
    train(net, lambda _: None, steps=0)
    assert variables["data"] is data


def test_an_average_that_raises_no_error_and_is_wrong_is_told(capsys):
    plugin = train(body(), ByName)
    assert plugin.report.notes == {WRITTEN: [""]}
    assert f"QLoRA: (the module itself): {WRITTEN}.\n" in capsys.readouterr().out


@pytest.mark.parametrize("average", [OfWeights, Twin, Reference])
def test_a_right_average_a_twin_that_trains_and_a_reference_are_not(average):
    plugin = train(body(), average, steps=5)
    assert plugin.report.notes == {} and plugin.report.copied == ["0", "3"]


def test_an_average_of_read_weights_is_that_of_the_weights():
    net, average = body(), None

    class Kept(OfWeights):
        def __init__(self, net):
            nonlocal average
            super().__init__(net)
            self.expected = self.net[0].weight.detach().clone()
            average = self

        def update(self, net):
            super().update(net)
            self.expected.lerp_(net[0].weight.detach() * 1, 0.5)

    train(net, Kept)
    assert torch.equal(average.net[0].weight, average.expected)


class Lit(pl.LightningModule):
    def __init__(self, target=None):
        super().__init__()
        self.net = body()
        self.target = target

    def training_step(self, batch, batch_idx):
        if self.target is not None:
            with torch.no_grad():
                for ours, theirs in zip(self.target.parameters(), self.net.parameters(), strict=False):
                    ours.mul_(0.5).add_(theirs, alpha=0.5)
        return self.net(batch).square().mean()

    def train_dataloader(self):
        return DataLoader(torch.randn(8, 64), batch_size=2)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


def in_pairs(copied, shadow, net):
    with torch.no_grad():
        for ours, theirs in zip(copied.parameters(), net.parameters(), strict=False):
            ours.copy_(theirs)


def in_lists(copied, shadow, net):
    torch._foreach_lerp_([*shadow.values()], [parameter.detach() for parameter in net.parameters()], 0.5)


def by_name(copied, shadow, net):
    for name, parameter in net.named_parameters():
        shadow[name] = shadow[name] + parameter.detach()


def by_state_dict(copied, shadow, net):
    copied.load_state_dict(net.state_dict())


def into_a_new_module(copied, shadow, net):
    body().load_state_dict(net.state_dict())


def unrelated(copied, shadow, net):
    raise RuntimeError("no space left")


class Average(Callback):
    def __init__(self, net, update):
        self.copied = copy.deepcopy(net)
        self.shadow = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        self.update = update

    def on_train_batch_end(self, trainer, module, *_):
        self.update(self.copied, self.shadow, module.net)


UPDATES = {
    in_pairs: FAILED.format("a copy of net."),
    in_lists: FAILED.format("a copy of net."),
    by_name: FAILED.format("a copy of net."),
    by_state_dict: OF_CONVERTED,
    into_a_new_module: OF_CONVERTED,
    unrelated: None,
}


@pytest.mark.parametrize("update", UPDATES)
def test_an_error_of_an_average_in_a_trainer_has_a_note_that_names_the_remedy(update, tmp_path, capsys):
    lit = Lit()
    trainer = make_trainer(tmp_path, plugins=QLoRAPrecision(**ARGUMENTS), callbacks=Average(lit.net, update))
    with pytest.raises((RuntimeError, KeyError)) as raised:
        trainer.fit(lit)
    said = capsys.readouterr().out
    if sys.version_info >= (3, 11):
        said = "".join(getattr(raised.value, "__notes__", []))
    if UPDATES[update] is None:
        assert "QLoRA: " not in said
    else:
        assert f"QLoRA: {UPDATES[update]}" in re.sub(r"net\.\d", "net.", said)


@pytest.mark.parametrize("arguments", [{}, {"exclude_modules": ["target"]}])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_target_that_stays_dense_beside_a_converted_module_too(frozen, arguments, tmp_path, capsys):
    if not (frozen or arguments):
        return
    lit = Lit(body().requires_grad_(not frozen))
    with pytest.raises(RuntimeError, match="shape") as raised:
        make_trainer(tmp_path, plugins=QLoRAPrecision(**ARGUMENTS, **arguments)).fit(lit)
    if sys.version_info >= (3, 11):
        assert raised.value.__notes__ == [f"QLoRA: {FAILED.format('target.0')}"]


class Momentum(nn.Module):
    """A student, and a target that follows it, in a module whose body is in 4 bits whatever happens to both."""

    def __init__(self, is_copy=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.student, self.target = body(), body(), body()
        if is_copy:
            self.target = copy.deepcopy(self.student)

    def forward(self, x):
        return F.mse_loss(self.student(self.body(x)), x.flip(0))

    @torch.no_grad()
    def follow(self):
        for ours, theirs in zip(self.target.parameters(), self.student.parameters(), strict=True):
            ours.mul_(0.5).add_(theirs, alpha=0.5)


def momentum(module, of_all, steps=8, **arguments):
    plugin = QLoRAPrecision(**ARGUMENTS, **arguments)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)
    net = fabric.setup_module(module)
    held = module if of_all else nn.ModuleList([module.body, module.student])
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(held.parameters(), lr=1e-2))
    for step in range(steps):
        module.follow()
        loss = net(torch.randn(8, 64, generator=torch.Generator().manual_seed(step)))
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
    return plugin


@pytest.mark.parametrize("of_all", [False, True])
def test_a_momentum_target_with_weights_of_its_own_is_refused_before_it_is_wrong(of_all):
    with pytest.raises(RuntimeError, match=r"target\.\* \(x2\).*follow those of student\.\* \(x2\).*modules_to_save"):
        momentum(Momentum(), of_all)


@pytest.mark.parametrize("arguments", [{"modules_to_save": ["student"], "exclude_modules": ["target"]}, None])
@pytest.mark.parametrize("is_copy", [False, True])
def test_with_both_in_full_a_target_is_that_of_the_dense_module(arguments, is_copy):
    module = Momentum(is_copy)
    expected = [parameter.detach().clone() for parameter in module.target.parameters()]
    momentum(module, False, **(arguments or {"modules_to_save": ["student", "target"]}))
    with torch.no_grad():
        reached = torch.cat([(ours - theirs).flatten() for ours, theirs in pairs(module)]).norm()
        moved = torch.cat([(p - q).flatten() for p, q in zip(module.target.parameters(), expected, strict=True)]).norm()
    assert reached < 0.1 * moved if not is_copy else reached < moved


def pairs(module):
    return zip(module.target.parameters(), module.student.parameters(), strict=True)


@pytest.mark.parametrize("of_all", [False, True])
def test_a_target_that_is_a_copy_follows_the_adapters_without_a_word(of_all, capsys):
    module = Momentum(is_copy=True)
    seen = []
    module.follow = lambda: (Momentum.follow(module), seen.append(module.student[0].lora_B.detach().clone()))
    plugin = momentum(module, of_all)
    expected = torch.zeros_like(seen[0])
    for value in seen:
        expected.mul_(0.5).add_(value, alpha=0.5)
    assert torch.equal(module.target[0].lora_B, expected) and expected.any()
    assert torch.equal(module.target[0].packed, module.student[0].packed)
    assert plugin.report.notes == {} and plugin.report.unused == {} and "no gradient" not in capsys.readouterr().out
