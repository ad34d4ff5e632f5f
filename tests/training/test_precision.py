"""QLoRAPrecision under the real Trainer."""

import copy
import pickle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint
from torch import nn

from lightning_qlora import CheckpointMismatchError, QLoRALinear, QLoRAPrecision, convert, quantize
from tests.conftest import Classifier, ResumableLoader, loader


def plugin(**arguments):
    return QLoRAPrecision(**{"r": 4, "lora_dropout": 0.1, **arguments})


def share_of_loss(module):
    """The last losses of a run by its first ones."""
    return sum(module.losses[-4:]) / sum(module.losses[:4])


def test_an_unchanged_module_trains(trainer):
    module = Classifier()
    one_argument = plugin()
    base = [quantize(module.net[0].weight), quantize(module.net[4].weight)]
    trainer(plugins=one_argument, max_epochs=15).fit(module, loader(), loader())
    assert share_of_loss(module) < 0.5
    assert torch.equal(module.net[0].packed.view(-1), base[0].packed.view(-1))
    assert torch.equal(module.net[4].packed.view(-1), base[1].packed.view(-1))
    assert one_argument.report.converted == ["net.0", "net.4"]


def test_only_adapters_get_optimizer_state(trainer):
    module = Classifier()
    run = trainer(plugins=plugin())
    run.fit(module, loader())
    assert {*run.optimizers[0].state} == {p for name, p in module.named_parameters() if "lora_" in name}


def test_all_stages_give_the_same_loss(trainer):
    module = Classifier()
    run = trainer(plugins=plugin())
    run.fit(module, loader())
    validated = run.validate(module, loader(), verbose=False)[0]["val_loss"]
    tested = run.test(module, loader(), verbose=False)[0]["test_loss"]
    predicted = torch.cat(run.predict(module, loader()))
    labels = torch.cat([y for _, y in loader()])
    assert validated == pytest.approx(tested)
    assert validated == pytest.approx(F.cross_entropy(predicted, labels).item(), rel=1e-5)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_stage_before_any_fit_converts_the_module(trainer, stage):
    module = Classifier()
    getattr(trainer(plugins=plugin()), stage)(module, loader())
    assert isinstance(module.net[0], QLoRALinear)


def test_validation_then_fit_trains(trainer):
    module = Classifier()
    run = trainer(plugins=plugin())
    before = run.validate(module, loader(), verbose=False)[0]["val_loss"]
    trainer(plugins=plugin(), max_epochs=5).fit(module, loader())
    assert trainer(plugins=plugin()).validate(module, loader(), verbose=False)[0]["val_loss"] < before


@pytest.mark.parametrize(
    "arguments",
    [
        {"fast_dev_run": True},
        {"overfit_batches": 1},
        {"enable_model_summary": True},
        {"detect_anomaly": True},
        {"max_steps": 3, "max_epochs": -1},
        {"val_check_interval": 1},
        {"inference_mode": False},
    ],
    ids=lambda a: next(iter(a)),
)
def test_arguments_of_the_trainer_work(trainer, arguments):
    module = Classifier()
    trainer(plugins=plugin(), **arguments).fit(module, loader(), loader())
    assert module.net[0].lora_B.abs().sum() > 0


def test_callbacks_work(trainer):
    module = Classifier()
    finder = LearningRateFinder(num_training_steps=8)
    module.lr = 1e-3
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=module.lr)
    trainer(plugins=plugin(), callbacks=[finder, EarlyStopping("val_loss", patience=1)], max_epochs=3).fit(
        module, loader(samples=128), loader()
    )
    assert finder.optimal_lr is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
        lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
        lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
        lambda p: torch.optim.Adafactor(p, 1e-2),
    ],
    ids=["sgd", "fused", "foreach", "adafactor"],
)
def test_optimizers_over_all_parameters_work(trainer, make):
    module = Classifier()
    module.configure_optimizers = lambda: make(module.parameters())
    packed = quantize(module.net[0].weight).packed
    trainer(plugins=plugin(), max_epochs=8).fit(module, loader())
    assert share_of_loss(module) < 1
    assert torch.equal(module.net[0].packed.view(-1), packed.view(-1))


def test_the_module_keeps_its_mode_and_adapters_use_dropout_only_in_training(trainer):
    """transformers loads models in eval mode, and Lightning does not change the mode."""
    module = Classifier()
    seen = []
    module.net.eval()

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(("train", module.net.training, module.net[0].training))

        def on_validation_batch_start(self, *args):
            seen.append(("validate", module.net.training, module.net[0].training))

    trainer(plugins=plugin(), callbacks=[Look()], limit_train_batches=1).fit(module, loader(), loader())
    assert set(seen) == {("train", False, True), ("validate", False, False)}
    assert module.net[0].training is False


# ---------------------------------------------------------------- checkpoints


def run_straight(trainer, epochs, **arguments):
    pl.seed_everything(1, verbose=False)
    module = Classifier(dropout=0.1)
    run = trainer(plugins=plugin(lora_dropout=0.3), max_epochs=epochs, **arguments)
    run.fit(module, loader(shuffle=True), loader())
    return module, run


@pytest.mark.parametrize("path", ["given", "last"])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(trainer, path, tmp_path):
    straight, whole = run_straight(trainer, 3)
    _, first = run_straight(trainer, 1, callbacks=[ModelCheckpoint(tmp_path / "c", save_last=True)])
    pl.seed_everything(99, verbose=False)
    resumed = Classifier(dropout=0.1)
    second = trainer(
        plugins=plugin(lora_dropout=0.3), max_epochs=3, callbacks=[ModelCheckpoint(tmp_path / "c", save_last=True)]
    )
    ckpt = "last" if path == "last" else first.checkpoint_callback.best_model_path
    second.fit(resumed, loader(shuffle=True), loader(), ckpt_path=ckpt)
    assert resumed.losses == straight.losses[4:]
    for (name, one), (_, other) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    states = [run.optimizers[0].state_dict()["state"] for run in (whole, second)]
    for key, state in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())


@pytest.mark.parametrize("stop", [1, 3, 8, 11])
def test_a_run_resumed_in_the_middle_of_an_epoch_is_bit_equal(trainer, tmp_path, stop):
    def run(steps, seed, ckpt=None):
        pl.seed_everything(seed, verbose=False)
        module = Classifier(dropout=0.1)
        run = trainer(plugins=plugin(lora_dropout=0.3), max_steps=steps, max_epochs=-1, enable_checkpointing=False)
        run.fit(module, ResumableLoader(), ckpt_path=ckpt)
        return module, run

    straight, _ = run(13, 1)
    _, first = run(stop, 1)
    first.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, _ = run(13, 77, tmp_path / "stop.ckpt")
    assert resumed.losses == straight.losses[stop:]
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_checkpoint_of_a_cpu_run_does_not_initialize_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: pytest.fail("this initializes CUDA"))
    assert [state.keys() for state in QLoRAPrecision().state_dict()["random_state"]] == [{"cpu"}]


def test_test_best_and_a_checkpoint_in_a_new_process_state(trainer):
    module = Classifier()
    run = trainer(plugins=plugin(), max_epochs=2)
    run.fit(module, loader(), loader())
    expected = run.test(module, loader(), ckpt_path="best", verbose=False)
    path = run.checkpoint_callback.best_model_path
    assert Path(path).stat().st_size < 60_000
    assert trainer(plugins=plugin()).test(Classifier(), loader(), ckpt_path=path, verbose=False) == expected


def test_weights_only_checkpoints_load(trainer, tmp_path):
    module = Classifier()
    run = trainer(plugins=plugin(), callbacks=[ModelCheckpoint(tmp_path / "w", save_weights_only=True)])
    run.fit(module, loader())
    path = run.checkpoint_callback.best_model_path
    assert "optimizer_states" not in torch.load(path, weights_only=True)
    trainer(plugins=plugin()).test(Classifier(), loader(), ckpt_path=path, verbose=False)


def test_a_full_checkpoint_contains_the_base(trainer):
    module = Classifier()
    run = trainer(plugins=plugin(checkpoint="full"))
    run.fit(module, loader())
    other = Classifier(seed=5)
    trainer(plugins=plugin(checkpoint="full")).test(
        other, loader(), ckpt_path=run.checkpoint_callback.best_model_path, verbose=False
    )
    assert torch.equal(other.net[0].packed, module.net[0].packed)
    assert torch.equal(other.net[2].weight, module.net[2].weight)


def test_a_dense_lightning_checkpoint_loads_quantized(trainer):
    dense = Classifier(seed=3)
    run = trainer()
    run.fit(dense, loader())
    path = run.checkpoint_callback.best_model_path
    module = Classifier()
    result = trainer(plugins=plugin()).test(module, loader(), ckpt_path=path, verbose=False)
    expected = copy.deepcopy(dense)
    convert(expected, r=4, lora_dropout=0.1)
    assert torch.equal(module.net[0].packed, expected.net[0].packed)
    assert result[0]["test_loss"] == pytest.approx(
        trainer(plugins=plugin()).test(expected, loader(), verbose=False)[0]["test_loss"]
    )


def test_a_checkpoint_of_another_base_or_rank_is_refused(trainer):
    run = trainer(plugins=plugin())
    run.fit(Classifier(), loader())
    path = run.checkpoint_callback.best_model_path
    with pytest.raises(CheckpointMismatchError, match=r"net\.0"):
        trainer(plugins=plugin()).fit(Classifier(seed=4), loader(), ckpt_path=path)
    with pytest.raises(CheckpointMismatchError, match=r"net\.0: .*rank 4 .*rank 2"):
        trainer(plugins=plugin(r=2)).fit(Classifier(), loader(), ckpt_path=path)


def test_a_trainer_without_the_plugin_does_not_convert(trainer, tmp_path):
    module = Classifier()
    run = trainer()
    run.fit(module, loader())
    assert type(module.net[0]) is nn.Linear
    trainer(max_epochs=2).fit(Classifier(), loader(), ckpt_path=run.checkpoint_callback.best_model_path)


def test_bf16_modules_and_explicit_compute_types_train(trainer):
    module = Classifier().to(torch.bfloat16)
    module.forward = lambda x: module.net(x.bfloat16())
    trainer(plugins=plugin(), max_epochs=10).fit(module, loader())
    assert share_of_loss(module) < 0.8
    module = Classifier()
    seen = []
    module.net[1].register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    trainer(plugins=plugin(compute_dtype="bf16"), max_epochs=10).fit(module, loader())
    assert set(seen) == {torch.bfloat16}
    assert share_of_loss(module) < 0.8


def test_a_module_compiled_by_the_user_trains(trainer):
    """Compiled inside: Lightning's own `self.log` can't be traced by torch 2.13."""
    module = Classifier()
    module.net = torch.compile(module.net, backend="aot_eager", fullgraph=True)
    trainer(plugins=plugin(), max_epochs=10).fit(module, loader())
    assert share_of_loss(module) < 0.7


def test_a_model_made_in_configure_model_trains(trainer):
    class Late(Classifier):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = Classifier().net

    module = Late()
    run = trainer(plugins=plugin(), max_epochs=2)
    run.fit(module, loader())
    assert isinstance(module.net[0], QLoRALinear)
    trainer(plugins=plugin(), max_epochs=3).fit(Late(), loader(), ckpt_path=run.checkpoint_callback.best_model_path)


def test_the_ranks_compare_their_kernels_once_on_the_device_of_the_layers(monkeypatch, trainer):
    """A rank that has used CUDA for something else must not wait there for one that has not."""
    devices = []
    monkeypatch.setattr("lightning_qlora.training.precision.agree", devices.append)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin())
    model = fabric.setup_module(nn.Linear(64, 64))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        fabric.backward(model(torch.randn(2, 64)).sum())
        optimizer.step()
    trainer(plugins=plugin(), max_steps=2).fit(Classifier(), loader())
    assert devices == [torch.device("cpu"), torch.device("cpu")]


def test_a_plugin_that_converted_a_module_can_be_copied_and_pickled(trainer):
    one = plugin()
    trainer(plugins=one, max_steps=1).fit(Classifier(), loader())
    for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        module = Classifier()
        trainer(plugins=other, max_steps=1).fit(module, loader())
        assert other.report.converted == ["net.0", "net.4"] and module.net[0].lora_B.any()
