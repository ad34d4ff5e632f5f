"""Where Lightning would train the wrong thing in silence."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, StochasticWeightAveraging

from lightning_qlora import QLoRALinear, QLoRAPrecision
from tests.conftest import Classifier, loader


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_that_would_drop_the_adapters_are_refused(trainer, strategy):
    run = trainer(plugins=QLoRAPrecision(r=4), strategy=strategy, devices=2)
    from lightning_qlora import guards

    with pytest.raises(RuntimeError, match=r"ddp_(spawn|fork).*dropped without a word.*strategy='ddp'"):
        guards.check_trainer(run, Classifier())


def test_a_spawned_fit_is_refused_by_the_process_itself(trainer):
    with pytest.raises(Exception, match="dropped without a word"):
        trainer(plugins=QLoRAPrecision(r=4), strategy="ddp_spawn", devices=1).fit(Classifier(), loader())


def averaging_callbacks():
    yield StochasticWeightAveraging(1e-2)
    for name in ("WeightAveraging", "EMAWeightAveraging"):
        if hasattr(pl.callbacks, name):
            yield getattr(pl.callbacks, name)()


@pytest.mark.parametrize("callback", list(averaging_callbacks()), ids=lambda c: type(c).__name__)
def test_callbacks_that_copied_the_module_before_are_refused(trainer, callback):
    run = trainer(plugins=QLoRAPrecision(r=4), callbacks=[callback], max_epochs=4)
    with pytest.raises(RuntimeError, match=rf"{type(callback).__name__} copied the module"):
        run.fit(Classifier(), loader())


def test_callbacks_that_unfreeze_parameters_later_are_refused_at_once(trainer):
    run = trainer(plugins=QLoRAPrecision(r=4), callbacks=[BackboneFinetuning(1)])
    module = Classifier()
    module.backbone = module.net
    with pytest.raises(RuntimeError, match=r"BackboneFinetuning freezes parameters before.*modules_to_save"):
        run.fit(module, loader())


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
