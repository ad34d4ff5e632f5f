"""With the plugin, hooks come in Lightning's own order when a checkpoint is restored."""

import os
import signal
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, Timer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn

from lightning_qlora import QLoRALinear, QLoRAPrecision
from lightning_qlora.training.patches import requeue_between_batches
from tests.conftest import Classifier, ResumableLoader, loader


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


class Signalled(Classifier):
    """Gets SLURM's signal in the forward pass of its third batch."""

    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("with_plugin", [False, True])
def test_a_slurm_job_is_saved_after_the_batch_and_queued_again(trainer, tmp_path, monkeypatch, with_plugin):
    """Lightning saves at once; tests/training/test_failing_rank.py has two ranks."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    ranks = dict.fromkeys(("PROCID", "LOCALID", "NODEID"), "0") | dict.fromkeys(("NTASKS", "NTASKS_PER_NODE"), "1")
    os.environ.update({f"SLURM_{name}": value for name, value in {**ranks, "JOB_ID": "4711"}.items()})
    os.environ["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> '{tmp_path}/queued'")
    (tmp_path / "scontrol").chmod(0o755)
    first = Signalled(dropout=0.1)
    resumed = Classifier(dropout=0.1)
    plugins = {"plugins": QLoRAPrecision(r=4, lora_dropout=0.1)} if with_plugin else {}
    run = trainer(**plugins)
    run.fit(first, ResumableLoader())
    assert (tmp_path / "queued").read_text() == "requeue 4711\n"
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=False)["global_step"] == 2 + with_plugin
    if with_plugin:
        requeue_between_batches(run)
        assert count_of_added(run) == 1
        requeue_between_batches(other := trainer(plugins=SLURMEnvironment(auto_requeue=False)))
        assert count_of_added(other) == 0
        trainer(**plugins).fit(resumed, ResumableLoader())  # Lightning finds the checkpoint
        assert resumed.losses == first.losses[3:]
        run.state.fn = TrainerFn.VALIDATING  # no batch that could end is trained
        run._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)
        assert (tmp_path / "queued").read_text() == 2 * "requeue 4711\n"


def test_slurms_signal_counts_on_rank_0_alone():
    saved = []
    connector = type("Connector", (), {"_slurm_sigusr_handler_fn": lambda _, *arguments: saved.append(arguments)})()
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision or all)
    run = SimpleNamespace(_signal_connector=connector, callbacks=[], strategy=strategy, is_global_zero=False)
    run._accelerator_connector = SimpleNamespace(cluster_environment=SLURMEnvironment())
    run.state = SimpleNamespace(fn=TrainerFn.FITTING)
    requeue_between_batches(run)
    after_batch = run.callbacks[0].on_train_batch_end
    connector._slurm_sigusr_handler_fn(3, "frame")
    after_batch()
    assert not saved
    run.is_global_zero = True
    after_batch()
    after_batch()
    run.state.fn = TrainerFn.VALIDATING
    connector._slurm_sigusr_handler_fn(3, "frame")
    assert saved == [(signal.SIGUSR1, None), (3, "frame")]
