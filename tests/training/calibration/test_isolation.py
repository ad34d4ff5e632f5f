"""A run with calibration and one without differ only in the initial adapters."""

import copy
import random
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import DynamicCache

from lightning_qlora import convert
from lightning_qlora.training.calibration.isolation import isolated
from tests.conftest import ResumableLoader
from tests.toys import ids, toy
from tests.training.calibration.test_calibration import Lit, Net, fit


class Meter:
    """An object of the user that keeps running means."""

    def __init__(self):
        self.count, self.values = 0, [torch.zeros(1)]

    def update(self):
        self.count += 1
        self.values[0] += 1
        self.values.append(torch.ones(1))


class Slotted:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


class Drawing(nn.Module):
    """Draws from its own generators and counts in attributes of many types."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.torch, self.numpy, self.python = torch.Generator(), np.random.default_rng(0), random.Random(0)
        self.old = np.random.RandomState(0)
        self.array, self.meter, self.slotted, self.meters = np.zeros(2), Meter(), Slotted(), [{"a": (Meter(),)}]
        self.unregistered = [nn.BatchNorm1d(64)]
        self.register_buffer("sparse", torch.eye(4).to_sparse())
        self.register_buffer("resized", torch.zeros(2))
        self.drawn = []

    def forward(self, x):
        noise = torch.randn(x.shape, generator=self.torch)
        self.drawn.append((noise[0, 0].item(), self.numpy.random(), self.python.random(), self.old.rand()))
        self.array += 1
        self.meter.update()
        self.meters[0]["a"][0].update()
        self.slotted.count += 1
        self.sparse += self.sparse.detach().clone()
        self.resized.resize_(len(x)).add_(1)
        return self.linear(self.unregistered[0](x + noise))

    def counts(self):
        meters = [self.meter, self.meters[0]["a"][0]]
        return (
            self.drawn, self.array.tolist(), [(m.count, [v.item() for v in m.values]) for m in meters],
            self.slotted.count, self.unregistered[0].running_mean.tolist(), self.sparse.to_dense().tolist(),
        )  # fmt: skip


def both(arguments, run):
    """Results of `run` with the default and with the calibrated initialization."""
    return [run(start, **arguments) for start in ("default", "calibrated")]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_generators_arrays_and_objects_of_the_module(trainer, accumulate):
    class Own(Lit):
        def __init__(self):
            super().__init__()
            self.net = Drawing()

    def run(start):
        arguments = {"target_modules": ["linear"]}
        module, _, _ = fit(
            trainer, Own(), start=start, arguments=arguments, max_steps=1, accumulate_grad_batches=accumulate
        )
        return module.net.counts()

    plain, calibrated = both({}, run)
    assert calibrated == plain


def test_a_cache_that_is_an_argument_is_filled_once():
    def run(start):
        model, cache, x = toy("llama").train(), DynamicCache(), ids()
        convert(model, r=4, init_lora_weights=start)
        with torch.no_grad():
            model(x[:, :6], past_key_values=cache, use_cache=True)
        model(x[:, 6:], past_key_values=cache, use_cache=True)
        return cache.get_seq_length(), model.model.layers[0].self_attn.q_proj.lora_B.any().item()

    (plain, _), (calibrated, started) = both({}, run)
    assert calibrated == plain
    assert started


def test_closures_over_the_module_see_its_attributes_and_their_changes_are_restored():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.features = nn.Linear(64, 64), nn.BatchNorm1d(64), []
            self.linear.register_forward_hook(lambda *call: self.features.append(call[2]))
            forward = self.norm.forward
            self.norm.forward = lambda x: 2 * forward(x)

        def forward(self, x):
            self.linear(x)
            return self.norm(self.features[-1])

    def run(start):
        net = Hooked()
        report = convert(net, r=4, init_lora_weights=start)
        net(torch.randn(4, 64))
        return (len(net.features), net.norm.num_batches_tracked.item()), report.calibration

    (plain, _), (calibrated, report) = both({}, run)
    assert calibrated == plain == (1, 1)
    assert report.calibrated == ["linear"]


def test_a_batch_of_any_class_is_restored(trainer):
    @dataclass
    class Batch:
        x: torch.Tensor
        used: int = 0

        def __len__(self):
            return len(self.x)

    class Mutating(Lit):
        def training_step(self, batch, batch_idx):
            batch.used += 1
            batch.x += 1
            self.seen.append((batch.used, batch.x.sum().item()))
            return self(batch.x).square().mean()

    data = DataLoader(
        torch.arange(32).float(), batch_size=8, collate_fn=lambda rows: Batch(torch.stack(rows)[:, None].repeat(1, 64))
    )
    plain, calibrated = both(
        {}, lambda start: fit(trainer, Mutating(), start=start, data=data, accumulate_grad_batches=2)[0].seen
    )
    assert calibrated == plain


def test_a_dataset_that_draws_random_numbers_draws_the_same_ones(trainer):
    class Noisy(Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            return torch.randn(64) + index + random.random() + np.random.rand(), 0

    def run(start, **arguments):
        random.seed(0), np.random.seed(0)
        module, _, _ = fit(trainer, start=start, data=DataLoader(Noisy(), batch_size=4), **arguments)
        return module.seen, module.noises

    for accumulate in (2, 4):
        plain, calibrated = both({"accumulate_grad_batches": accumulate}, run)
        assert calibrated == plain


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_stateful_loader_resumes_after_the_last_trained_batch(trainer, tmp_path, steps):
    arguments = {"calibration_batches": 3}

    def run(module, steps, ckpt_path=None):
        return fit(
            trainer,
            module,
            data=ResumableLoader(),
            arguments=arguments,
            ckpt_path=ckpt_path,
            max_epochs=-1,
            max_steps=steps,
        )[0]

    class Seen(Lit):
        def on_train_batch_end(self, *_):
            self.places = [*getattr(self, "places", []), self.trainer.fit_loop._combined_loader._state_dicts()]

    straight = run(Seen(), 8)
    assert straight.places == [[{"next": place}] for place in (1, 2, 3, 4, 5, 6, 7, 8)]
    first = run(Lit(), steps)
    first.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    second = run(Lit(), 8, tmp_path / "stopped.ckpt")
    assert [total for _, total in first.seen + second.seen] == [total for _, total in straight.seen]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_values_logged_in_forward_are_logged_once_and_loggers_have_their_folders(trainer, tmp_path, accumulate):
    class Logging(Lit):
        def forward(self, x):
            if self.trainer.training:
                self.log("forward", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
                self.logger.log_metrics({"row": 1.0}, step=len(self.seen))
                assert self.logger.log_dir.startswith(str(tmp_path))
                assert self.logger.name == "logs"
            return super().forward(x)

    def run(start):
        logger = CSVLogger(tmp_path / start, name="logs")
        module, _, _ = fit(trainer, Logging(), start=start, logger=logger, accumulate_grad_batches=accumulate)
        assert "log" not in vars(module)
        return module.trainer.callback_metrics["forward"].item(), len(logger.experiment.metrics)

    plain, calibrated = both({}, run)
    assert calibrated == plain
    assert plain[0] == 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_code_that_computes_gradients_works(trainer, accumulate):
    class Adversarial(Lit):
        def forward(self, x):
            hidden = self.norm(x)
            if hidden.requires_grad:
                hidden.retain_grad()
            return self.net(hidden)

        def training_step(self, batch, batch_idx):
            x = batch[0].clone().requires_grad_()
            (slope,) = torch.autograd.grad(self(x).square().mean(), x)
            return self(batch[0] + 0.01 * slope.sign()).square().mean()

    _, plugin, _ = fit(trainer, Adversarial(), accumulate_grad_batches=accumulate)
    assert len(plugin.report.calibration.calibrated) == 2


def test_an_object_that_another_thread_may_change_is_not_restored():
    class Worker:
        def __init__(self):
            self.lock, self.done = threading.Lock(), 0

    net = Net()
    net.worker, net.plain = Worker(), Meter()
    with isolated(net):
        net.worker.done, net.plain.count = 5, 5
    assert (net.worker.done, net.plain.count) == (5, 0)


def test_very_deep_and_circular_attributes():
    net = Net()
    net.deep = [torch.zeros(1)]
    for _ in range(5000):
        net.deep = [net.deep]
    net.circle = {}
    net.circle["self"] = net.circle
    before = copy.copy(net.circle)
    with isolated(net):
        net.circle["new"] = 1
    assert net.circle.keys() == before.keys()
