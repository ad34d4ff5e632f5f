"""Errors where Lightning would train the wrong parameters, or lose the adapters, without an error."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    ModelPruning,
    StochasticWeightAveraging,
    ThroughputMonitor,
)
from lightning.pytorch.loggers import CSVLogger

from lightning_qlora import QLoRALinear, QLoRAPrecision
from tests.conftest import Classifier, loader


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_launchers_that_would_lose_the_adapters_are_refused(trainer, strategy):
    run = trainer(plugins=QLoRAPrecision(r=4), strategy=strategy, devices=2)
    from lightning_qlora.training import guards

    with pytest.raises(RuntimeError, match=r"ddp_(spawn|fork).*lost without an error.*strategy='ddp'"):
        guards.check_trainer(run, Classifier())


def test_a_spawned_fit_is_refused_by_the_process_itself(trainer):
    with pytest.raises(Exception, match="lost without an error"):
        trainer(plugins=QLoRAPrecision(r=4), strategy="ddp_spawn", devices=1).fit(Classifier(), loader())


def averaging_callbacks():
    yield StochasticWeightAveraging(1e-2)
    for name in ("WeightAveraging", "EMAWeightAveraging"):
        if hasattr(pl.callbacks, name):
            yield getattr(pl.callbacks, name)()


@pytest.mark.parametrize("callback", list(averaging_callbacks()), ids=lambda c: type(c).__name__)
def test_callbacks_that_copied_the_module_before_conversion_are_refused(trainer, callback):
    run = trainer(plugins=QLoRAPrecision(r=4), callbacks=[callback], max_epochs=4)
    with pytest.raises(RuntimeError, match=rf"{type(callback).__name__} copied the module"):
        run.fit(Classifier(), loader())


def test_callbacks_that_unfreeze_parameters_are_refused(trainer):
    run = trainer(plugins=QLoRAPrecision(r=4), callbacks=[BackboneFinetuning(1)])
    module = Classifier()
    module.backbone = module.net
    with pytest.raises(RuntimeError, match=r"BackboneFinetuning freezes parameters before.*modules_to_save"):
        run.fit(module, loader())


def test_pruning_is_refused(trainer):
    run = trainer(plugins=QLoRAPrecision(r=4), callbacks=[ModelPruning("l1_unstructured", amount=0.5)])
    with pytest.raises(RuntimeError, match=r"ModelPruning sets entries of float weights to zero.*merge"):
        run.fit(Classifier(), loader())


@pytest.mark.parametrize("kind", ["throughput", "batch size"])
def test_callbacks_that_measure_work(trainer, kind, tmp_path):
    module = Classifier()
    module.batch_size = 1
    module.train_dataloader = lambda: loader(batch_size=module.batch_size)
    module.val_dataloader = loader
    callback = {
        "throughput": lambda: ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0])),
        "batch size": lambda: BatchSizeFinder(steps_per_trial=1, max_trials=2),
    }[kind]()
    logger = CSVLogger(tmp_path)
    trainer(plugins=QLoRAPrecision(r=4), callbacks=[callback], logger=logger, log_every_n_steps=1).fit(module)
    assert module.net[0].lora_B.any()
    assert (module.batch_size > 1) == (kind == "batch size")


@pytest.mark.parametrize("kind", ["Adagrad", "stepped"])
def test_an_optimizer_made_in_init_that_has_state_is_refused(trainer, kind):
    class Early(Classifier):
        def __init__(self):
            super().__init__()
            if kind == "Adagrad":  # makes its state at once
                self.early = torch.optim.Adagrad(self.parameters(), lr=1e-2)
                return
            self.early = torch.optim.AdamW(self.parameters(), lr=1e-2)
            self(torch.randn(2, 64)).sum().backward()
            self.early.step()

        def configure_optimizers(self):
            return self.early

    with pytest.raises(RuntimeError, match=r"created before the module was converted.*configure_optimizers.*no state"):
        trainer(plugins=QLoRAPrecision(r=4)).fit(Early(), loader())


def test_lbfgs_over_all_parameters_is_refused_and_over_the_adapters_works(trainer):
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())
    with pytest.raises(RuntimeError, match=r"LBFGS.*requires_grad"):
        trainer(plugins=QLoRAPrecision(r=4)).fit(module, loader())
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.LBFGS(
        [p for p in module.parameters() if p.requires_grad], lr=0.1, max_iter=4
    )
    one_batch = loader(32, 32)  # of several, the last may be harder than the first
    trainer(plugins=QLoRAPrecision(r=4, lora_dropout=0.0), max_epochs=4).fit(module, one_batch)
    assert module.losses[-1] < module.losses[0]


def test_weights_that_were_never_loaded_are_refused(trainer):
    with torch.device("meta"):
        module = Classifier()
    with pytest.raises(ValueError, match=r"net\.0.weight: .*meta device"):
        trainer(plugins=QLoRAPrecision(r=4)).fit(module, loader())


def test_precision_beside_the_plugin_is_refused_by_lightning(trainer):
    with pytest.raises(ValueError, match="precision"):
        trainer(plugins=QLoRAPrecision(r=4), precision="bf16-mixed")


def test_a_trainer_whose_callbacks_hold_other_modules_is_accepted(trainer):
    class Holder(pl.Callback):
        def __init__(self):
            self.metric = torch.nn.Linear(64, 64)

    module, holder = Classifier(), Holder()
    trainer(plugins=QLoRAPrecision(r=4), callbacks=[holder]).fit(module, loader())
    assert isinstance(module.net[0], QLoRALinear)
    assert type(holder.metric) is torch.nn.Linear
