"""With the plugin, hooks come in Lightning's own order when a checkpoint is restored."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, Timer

from lightning_qlora import QLoRALinear, QLoRAPrecision
from tests.conftest import Classifier, loader


class Recorder(pl.Callback):
    """Records the order of hooks, and the state that `on_fit_start` sees."""

    def __init__(self):
        self.calls = []
        self.fits = 0

    def on_load_checkpoint(self, *_):
        self.calls.append("callback.on_load_checkpoint")

    def load_state_dict(self, state):
        self.calls.append("callback.load_state_dict")
        self.fits = state["fits"]

    def state_dict(self):
        return {"fits": self.fits}

    def on_fit_start(self, trainer, module):
        self.calls.append(f"callback.on_fit_start, fits={self.fits}")
        self.fits += 1


class Module(Classifier):
    """Saves its learning rate in the checkpoint and makes its optimizer with the restored one."""

    lr = 1e-2
    calls: list[str]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["lr"] = self.lr / 10

    def on_load_checkpoint(self, checkpoint):
        self.calls.append("module.on_load_checkpoint")
        self.lr = checkpoint["lr"]

    def on_fit_start(self):
        self.calls.append("module.on_fit_start")

    def configure_optimizers(self):
        self.calls.append("module.configure_optimizers")
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def count_of_added(trainer):
    return sum(isinstance(callback, LambdaCallback) for callback in trainer.callbacks)


@pytest.mark.parametrize("with_plugin", [False, True])
def test_callbacks_and_module_hooks_come_in_lightnings_order(trainer, tmp_path, with_plugin):
    plugins = {"plugins": QLoRAPrecision(r=4)} if with_plugin else {}

    def fit(epochs, ckpt_path=None):
        recorder = Recorder()
        module = Module()
        module.calls = recorder.calls
        run = trainer(callbacks=[recorder], max_epochs=epochs, **plugins)
        run.fit(module, loader(), ckpt_path=ckpt_path)
        return run, module

    fit(1)[0].save_checkpoint(tmp_path / "c.ckpt")
    _, module = fit(2, tmp_path / "c.ckpt")
    assert module.calls == [
        "module.on_load_checkpoint",
        "callback.on_load_checkpoint",
        "callback.load_state_dict",
        "module.configure_optimizers",
        "callback.on_fit_start, fits=1",
        "module.on_fit_start",
    ]
    assert module.lr == 1e-3 and count_of_added(module.trainer) == 0
    assert isinstance(module.net[0], QLoRALinear) == with_plugin


def test_a_timer_whose_time_is_used_up_trains_no_further_step(trainer, tmp_path):
    def run(max_steps, ckpt_path=None):
        timer = Timer({"seconds": 60})
        new = trainer(plugins=QLoRAPrecision(r=4), callbacks=[timer], max_epochs=-1, max_steps=max_steps)
        new.fit(Classifier(), loader(), ckpt_path=ckpt_path)
        return new

    path = tmp_path / "c.ckpt"
    run(2).save_checkpoint(path)
    content = torch.load(path, weights_only=False)
    content["callbacks"]["Timer"]["time_elapsed"]["train"] = 100.0
    torch.save(content, path)
    assert run(8, path).global_step == 2
