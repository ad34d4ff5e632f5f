"""Errors where Lightning would train the wrong parameters, or lose the adapters, without an error."""

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    ThroughputMonitor,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_qlora import QLoRALinear, QLoRAPrecision, convert, merge
from lightning_qlora.optim.optimizer_parameters import check_optimizer
from lightning_qlora.plugin.precision import IN_NO_OPTIMIZER
from lightning_qlora.runs.guards import check_trainer
from lightning_qlora.tensors.held_types import KEPT_IN_FP32
from tests.conftest import Classifier, loader


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_launchers_that_would_lose_the_adapters_are_refused(trainer, strategy):
    run = trainer(plugins=QLoRAPrecision(r=4), strategy=strategy, devices=2)
    with pytest.raises(RuntimeError, match=r"ddp_(spawn|fork)'.*lost without an error.*strategy='ddp'"):
        check_trainer(run, Classifier())


@pytest.mark.slow
def test_a_spawned_fit_is_refused_by_the_process_itself(fit):
    with pytest.raises(Exception, match="lost without an error"):
        fit(Classifier(), loader(), strategy="ddp_spawn")


REFUSED = {
    "StochasticWeightAveraging copied the module.*lightning_qlora.convert": lambda: StochasticWeightAveraging(1e-2),
    "BackboneFinetuning freezes parameters before.*modules_to_save": lambda: BackboneFinetuning(1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_callbacks_that_change_weights_which_conversion_replaces_are_refused(fit, message):
    module = Classifier()
    module.backbone = module.net
    with pytest.raises(RuntimeError, match=message):
        fit(module, loader(), callbacks=REFUSED[message](), max_epochs=4)


class Holder(pl.Callback):
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize("average", [copy.deepcopy, AveragedModel])
def test_a_callback_may_hold_modules_but_no_dense_copy(trainer, average):
    dense, module = Classifier(), Classifier()
    convert(module, r=4)
    for value in (module, module.net, nn.Linear(64, 64), average(module)):
        check_trainer(trainer(callbacks=[Holder(value)]), module)
    with pytest.raises(RuntimeError, match=r"Holder copied the module \(its attribute 'value'\)"):
        check_trainer(trainer(callbacks=[Holder(average(dense))]), module)


def tunable():
    module = Classifier()
    module.batch_size = 1
    module.lr = 1e-2
    module.train_dataloader = lambda: loader(batch_size=module.batch_size)
    module.val_dataloader = loader
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), module.lr)
    return module


def test_callbacks_that_measure_or_schedule_work(trainer, tmp_path):
    """What they log, and what is trained, is what Lightning's own run has."""
    pytest.importorskip("psutil")
    columns = {}
    for plugins in ({}, {"plugins": QLoRAPrecision(r=4)}):
        module = tunable()
        logger = CSVLogger(tmp_path, name=str(len(columns)))
        callbacks = [
            ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0])),
            DeviceStatsMonitor(cpu_stats=True),
            LearningRateMonitor(),
            EarlyStopping("val_loss"),
            GradientAccumulationScheduler({0: 2}),
        ]
        run = trainer(callbacks=callbacks, logger=logger, log_every_n_steps=1, **plugins)
        run.fit(module)
        header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
        columns[bool(plugins)] = header.split(","), run.global_step
    assert columns[True] == columns[False]
    assert module.net[0].lora_B.any()


@pytest.mark.parametrize("through", ["callback", "tuner"])
def test_the_batch_size_finder_works_and_trains_the_adapters_from_their_initial_values(trainer, through, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda", lambda: None)  # slow
    module = tunable()
    arguments = {"steps_per_trial": 1, "max_trials": 2}
    callbacks = [BatchSizeFinder(**arguments)] if through == "callback" else []
    run = trainer(plugins=QLoRAPrecision(r=4), callbacks=callbacks)
    if through == "tuner":
        Tuner(run).scale_batch_size(module, **arguments)
        assert isinstance(module.net[0], QLoRALinear) and not module.net[0].lora_B.any()
    run.fit(module)
    assert module.batch_size == 4 and run.global_step == 8 and module.net[0].lora_B.any()


@pytest.mark.parametrize("through", ["callback", "tuner"])
def test_the_learning_rate_finder_works_and_restores_the_adapters(trainer, through):
    module = tunable()
    rates = []
    start = {}
    module.on_train_start = lambda: (rates.append(module.lr), start.update(copy.deepcopy(module.state_dict())))
    finder = LearningRateFinder(num_training_steps=30)
    run = trainer(plugins=QLoRAPrecision(r=4), callbacks=[finder] if through == "callback" else [], max_steps=40)
    if through == "tuner":
        found = Tuner(run).lr_find(module, num_training=30)
        assert not module.net[0].lora_B.any()
        module.lr = found.suggestion()
    run.fit(module)
    suggestion = (found if through == "tuner" else finder.optimal_lr).suggestion()
    assert suggestion is not None and suggestion != 1e-2 and rates[-1] == pytest.approx(suggestion)
    assert not start["net.0.lora_B"].any() and module.net[0].lora_B.any()


@pytest.mark.parametrize("kind", ["Adagrad", "stepped"])
def test_an_optimizer_made_in_init_that_has_state_is_refused(fit, kind):
    class Early(Classifier):
        def __init__(self):
            super().__init__()
            if kind == "Adagrad":  # makes its state at once
                self.early = torch.optim.Adagrad(self.parameters(), lr=1e-2)
                return
            self.early = torch.optim.AdamW(self.parameters(), lr=1.0)  # after a step nothing looks initial
            self(torch.randn(2, 64)).sum().backward()
            self.early.step()

        def configure_optimizers(self):
            return self.early

    message = r"before the module was converted and has state.*of 2 layers \(net\.0, \.\.\.\).*configure_optimizers"
    with pytest.raises(RuntimeError, match=message):
        fit(Early(), loader())
    module = Early()
    module.early.state[module.net[0].weight] = {}
    convert(module, r=4)
    merge(module)
    with pytest.raises(RuntimeError, match=r"replaced weights of 2 layers \(merged since, \.\.\.\)"):
        check_optimizer(module.early)


@pytest.mark.parametrize("kind", ["frozen after conversion", "part that conversion froze"])
def test_an_optimizer_of_frozen_parameters_only_is_refused(fit, kind):
    module = Classifier()
    if kind == "frozen after conversion":
        convert(module, r=4)
        module.requires_grad_(False)
    else:
        module.configure_optimizers = lambda: torch.optim.SGD(module.net[2].parameters(), lr=1e-2)  # a layer norm
    with pytest.raises(RuntimeError, match=r"All \d+ parameters of the (AdamW|SGD) are frozen.*modules_to_save"):
        fit(module, loader())


def test_a_checkpoint_on_an_exception_holds_the_adapters_and_waits_for_no_other_rank(fit, tmp_path, monkeypatch):
    """The other ranks are in another collective, or have ended."""

    def gather(*_):
        raise AssertionError("a collective after an error")

    module = Classifier()

    def fail(*_):
        if module.global_step == 3:
            for place in ("tensors.dtensor", "checkpoints.run_state", "survey.parts"):
                monkeypatch.setattr(f"lightning_qlora.{place}.of_all_ranks", gather)
            raise ZeroDivisionError

    module.on_train_batch_end = fail
    with pytest.raises(ZeroDivisionError):
        fit(module, loader(), callbacks=OnExceptionCheckpoint(tmp_path))
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == 3 and len(saved["QLoRAPrecision"]["random_state"]) == 1
    state = saved["state_dict"]
    assert torch.equal(state["net.0.lora_B"], module.net[0].lora_B) and "net.0.weight" not in state


class Chosen(Classifier):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.chosen(), lr=1e-3)


def test_an_optimizer_of_a_decoded_weight_is_refused(fit):
    module = Chosen()
    module.chosen = lambda: [module.net[0].weight]
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        fit(module, loader())


def test_adapters_in_no_optimizer_are_named(fit, capsys):
    module, both, none, frozen = Chosen(), Classifier(), Classifier(), Chosen()
    module.chosen = module.net[0].parameters
    for each in (both, none):
        each.automatic_optimization = False
    both.configure_optimizers = lambda: [torch.optim.AdamW(both.net[i].parameters(), lr=1e-3) for i in (0, 4)]
    none.configure_optimizers = lambda: []
    convert(frozen, r=4)
    frozen.net[4].requires_grad_(False)
    frozen.chosen = frozen.net[0].parameters
    for each in (module, both, none, frozen):
        run = fit(each, loader(), enable_checkpointing=False, max_steps=1)
    run.validate(module, loader())
    assert module.net[0].lora_B.any() and not module.net[4].lora_B.any()
    lines = [line for line in capsys.readouterr().out.splitlines() if IN_NO_OPTIMIZER in line]
    assert lines == [f"QLoRA: net.4: {IN_NO_OPTIMIZER}."]


def test_adapters_that_on_save_checkpoint_removes_are_named(fit, tmp_path):
    class Removes(Classifier):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {}

    run = fit(Removes(), loader(), max_steps=1, enable_checkpointing=False)
    with pytest.warns(UserWarning, match=r"has 0 of the adapters of 2 layers \(net\.0, net\.4\).*on_save_checkpoint"):
        run.save_checkpoint(tmp_path / "x.ckpt")


class Negated(nn.Linear):
    """As modules of torchvision and detectron2: entries of version 1 have another meaning."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, metadata, *arguments):
        if (metadata.get("version") or 1) < 2:
            state_dict[prefix + "bias"] = -state_dict[prefix + "bias"]
        super()._load_from_state_dict(state_dict, prefix, metadata, *arguments)


def test_a_checkpoint_has_the_versions_of_modules_which_tell_what_their_entries_mean(fit, trainer, tmp_path):
    class Versioned(Classifier):
        def __init__(self):
            super().__init__()
            self.net.insert(1, Negated(64, 64))
            self.net.insert(2, torch.nn.utils.spectral_norm(nn.Linear(64, 64)))

    arguments = {"r": 4, "modules_to_save": ["net.1"]}
    module = Versioned()
    again = copy.deepcopy(module)
    run = fit(module, loader(), max_steps=2, plugins=QLoRAPrecision(**arguments))
    run.save_checkpoint(tmp_path / "x.ckpt")
    trainer(plugins=QLoRAPrecision(**arguments)).validate(again, loader(), ckpt_path=tmp_path / "x.ckpt")
    assert torch.equal(again.net[1].bias, module.net[1].bias)


class InHook(Classifier):
    def __init__(self):
        super().__init__()
        self.net.bfloat16()

    def forward(self, x):
        return super().forward(x.bfloat16()).float()

    def on_train_batch_end(self, *_):
        F.linear(torch.ones(1, 64, dtype=torch.bfloat16), self.weight_in_hook())

    def weight_in_hook(self):
        return self.net[4].weight


class Cast(InHook):
    def weight_in_hook(self):
        return self.net[4].weight.bfloat16()


def test_an_error_of_types_outside_of_the_steps_names_the_remedy(trainer, fast, capsys):
    def fit(module):
        plugin = QLoRAPrecision(r=4, modules_to_save=["net.4"])
        trainer(plugins=plugin, max_epochs=1, enable_checkpointing=False).fit(module, loader())

    fit(Cast())
    with pytest.raises(RuntimeError, match="dtype") as raised:
        fit(InHook())
    said = "".join(getattr(raised.value, "__notes__", [])) + capsys.readouterr().out
    assert f"QLoRA: {KEPT_IN_FP32.format('net.4.weight')}" in said
