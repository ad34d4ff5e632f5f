"""Lightning's WeightAveraging callbacks average what trains in a converted module, and nothing else."""

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_qlora import QLoRAPrecision
from lightning_qlora.training.guards import check_trainer
from tests.conftest import Classifier, loader

if not hasattr(pl.callbacks, "WeightAveraging"):
    pytest.skip("this Lightning has no WeightAveraging", allow_module_level=True)

ARGUMENTS = {"r": 4, "lora_dropout": 0.0, "modules_to_save": ["net.2"]}
CALLBACKS = {
    "mean": lambda: pl.callbacks.WeightAveraging(),
    "mean, no buffers": lambda: pl.callbacks.WeightAveraging(use_buffers=False),
    "moving": lambda: pl.callbacks.EMAWeightAveraging(decay=0.7),
}


class Recorder(pl.Callback):
    """What trains, after each step and in each validation."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append(trained(module))

    def on_validation_batch_start(self, trainer, module, *_):
        self.validated.append(trained(module))


def trained(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def frozen(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}


def averages(steps, kind):
    """The averages that the callback should have after each step."""
    found = [steps[0]]
    for number, step in enumerate(steps[1:], 1):
        share = 0.3 if kind == "moving" else 1 / (number + 1)
        found.append({name: value + share * (step[name] - value) for name, value in found[-1].items()})
    return found


def module_with_buffers():
    module = Classifier()
    module.net.append(nn.BatchNorm1d(8))
    return module


@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize("start", ["default", "calibrated"])
def test_what_trains_is_averaged_and_the_base_is_shared(trainer, kind, start):
    module, recorder, average = module_with_buffers(), Recorder(), CALLBACKS[kind]()
    plugin = QLoRAPrecision(**ARGUMENTS, init_lora_weights=start)
    run = trainer(plugins=plugin, callbacks=[average, recorder], max_epochs=2, enable_checkpointing=False)
    other = copy.deepcopy(module)
    run.fit(module, loader(), loader())
    expected = averages(recorder.steps, kind)
    assert len(recorder.steps) == 8 and set(expected[-1]) == set(trained(module))
    assert not torch.equal(expected[-1]["net.0.lora_B"], recorder.steps[-1]["net.0.lora_B"])
    torch.testing.assert_close(trained(module), expected[-1])
    for seen in recorder.validated[-4:]:  # the validation of the second epoch
        torch.testing.assert_close(seen, expected[-1])
    shared = dict(average._average_model.module.named_parameters())
    for name, parameter in module.named_parameters():
        assert (shared[name] is parameter) == (not parameter.requires_grad), name
    # The base has the bytes that a conversion of the same module has.
    trainer(plugins=QLoRAPrecision(**ARGUMENTS)).validate(other, loader(), verbose=False)
    assert all(torch.equal(value, frozen(other)[name]) for name, value in frozen(module).items())


@pytest.mark.parametrize("kind", ["mean", "moving"])
def test_a_resumed_run_has_the_averages_of_one_that_was_not_interrupted(trainer, tmp_path, kind):
    def run(epochs, ckpt_path=None):
        module = module_with_buffers()
        new = trainer(plugins=QLoRAPrecision(**ARGUMENTS), callbacks=[CALLBACKS[kind]()], max_epochs=epochs)
        new.fit(module, loader(), ckpt_path=ckpt_path)
        return module, new.checkpoint_callback.best_model_path

    whole, _ = run(2)
    half, path = run(1)
    saved = torch.load(path, weights_only=True)
    assert "net.0.weight" not in saved["state_dict"] and "current_model_state" in saved
    assert torch.equal(saved["state_dict"]["net.0.lora_B"], half.net[0].lora_B)  # the average, as at the end
    resumed, _ = run(2, path)
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(resumed)[name]), name


def test_a_second_fit_of_the_module_averages_again(trainer):
    module, average = Classifier(), CALLBACKS["mean"]()
    for _ in range(2):
        recorder = Recorder()
        trainer(plugins=QLoRAPrecision(**ARGUMENTS), callbacks=[average, recorder]).fit(module, loader())
        average._latest_update_step = 0
        torch.testing.assert_close(trained(module), averages(recorder.steps, "mean")[-1])


def test_a_sharded_module_is_refused():
    average = CALLBACKS["mean"]()
    average._average_model = AveragedModel(Classifier())
    run = SimpleNamespace(callbacks=[average], strategy=ModelParallelStrategy())
    with pytest.raises(RuntimeError, match=r"WeightAveraging copied the module.*average the adapters"):
        check_trainer(run, Classifier())
