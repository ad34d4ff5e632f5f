"""QLoRAPrecision under the real Trainer; tests/plugin/test_gpu.py has more, on a CPU and a GPU."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn

from lightning_qlora import QLoRALinear, QLoRAPrecision, convert
from lightning_qlora.kernels import scratch
from lightning_qlora.plugin import precision
from tests.conftest import Classifier, ResumableLoader, loader
from tests.toys import assert_equal


def plugin(**arguments):
    return QLoRAPrecision(**{"r": 4, "lora_dropout": 0.1, **arguments})


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_stage_converts_the_module_and_all_stages_give_one_loss(trainer, stage, capsys):
    module = Classifier()
    run = trainer(plugins=plugin(), max_epochs=5)
    getattr(run, stage)(module, loader())
    assert isinstance(module.net[0], QLoRALinear) and not module.net[0].lora_B.any()
    report = run.precision_plugin.report
    assert capsys.readouterr().out.count(str(report)) == 1
    before = run.validate(module, loader(), verbose=False)[0]["val_loss"]
    run.fit(module, loader())
    validated = run.validate(module, loader(), verbose=False)[0]["val_loss"]
    tested = run.test(module, loader(), verbose=False)[0]["test_loss"]
    labels = torch.cat([y for _, y in loader()])
    predicted = F.cross_entropy(torch.cat(run.predict(module, loader())), labels).item()
    assert validated == pytest.approx(tested) == pytest.approx(predicted, rel=1e-5) and validated < before
    assert "parameters train" not in capsys.readouterr().out and run.precision_plugin.report is report


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
    assert module.net[0].lora_B.any()


def test_the_module_keeps_its_mode_and_adapters_use_dropout_only_in_training(trainer, monkeypatch):
    """transformers loads models in eval mode, and Lightning does not change the mode."""
    module = Classifier()
    seen = []
    released = []
    monkeypatch.setattr(scratch, "release", lambda: released.append(module.net[0].training))
    module.net.eval()

    class Look(pl.Callback):
        def on_train_batch_start(self, run, module, batch, batch_idx):
            seen.append(("train", module.net.training, module.net[0].training))
            other = trainer(plugins=run.precision_plugin, limit_val_batches=1)  # within this run
            other.validate(Classifier(), loader(), verbose=False)

        def on_validation_batch_start(self, *args):
            seen.append(("validate", module.net.training, module.net[0].training))

    run = trainer(plugins=plugin(), callbacks=[Look()], limit_train_batches=2)
    run.fit(module, loader(), loader())
    assert set(seen) == {("train", False, True), ("validate", False, False)}
    assert module.net[0].training is False and released == [False]
    module.net.train()
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(), loader())
    assert module.net[0].training and released == [False, True]


def test_gradients_are_clipped(trainer):
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1.0)
    trainer(plugins=plugin(), max_steps=1, gradient_clip_val=1e-3).fit(module, loader())
    adapters = torch.cat([module.net[index].lora_B.flatten() for index in (0, 4)])  # A has no gradient yet
    assert adapters.norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("stop", [3, 8])
def test_a_run_resumed_in_the_middle_of_an_epoch_is_bit_equal(trainer, tmp_path, stop):
    def run(steps, seed, ckpt=None):
        pl.seed_everything(seed, verbose=False)
        module = Classifier(dropout=0.1)
        run = trainer(plugins=plugin(lora_dropout=0.3), max_steps=steps, max_epochs=-1, enable_checkpointing=False)
        run.fit(module, ResumableLoader(), ckpt_path=ckpt)
        return module, run

    straight, whole = run(13, 1)
    _, first = run(stop, 1)
    first.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, second = run(13, 77, tmp_path / "stop.ckpt")
    assert resumed.losses == straight.losses[stop:]
    assert_equal([*resumed.parameters()], [*straight.parameters()])
    assert_equal(*(each.optimizers[0].state_dict()["state"] for each in (second, whole)))


class Save(pl.Callback):
    """Saves in one hook, at one step."""

    def __init__(self, hook, step, path):
        def save(run, *_):
            if run.global_step == step and not run.sanity_checking:
                run.save_checkpoint(path)

        setattr(self, hook, save)


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 13, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    ("hook", "step"), [("on_train_batch_end", 3), ("on_validation_end", 4), ("on_validation_end", 8)]
)
def test_a_run_resumed_beside_validations_is_bit_equal(trainer, tmp_path, hook, step, limit):
    """`ModelCheckpoint(monitor=...)` saves when a validation ends, in the middle of an epoch and at its end."""

    def run(seed, ckpt=None, **arguments):
        pl.seed_everything(seed, verbose=False)
        module = Classifier(dropout=0.1)
        run = trainer(plugins=plugin(lora_dropout=0.3), val_check_interval=4, **limit, **arguments)
        run.fit(module, ResumableLoader(), loader(shuffle=True), ckpt_path=ckpt)
        return module

    straight = run(1, callbacks=[Save(hook, step, tmp_path / "stop.ckpt")])
    resumed = run(77, tmp_path / "stop.ckpt")
    assert resumed.losses == straight.losses[step:]


def test_a_run_resumed_at_the_end_of_an_epoch_shuffles_and_drops_as_before(trainer, tmp_path):
    """Also where code draws random numbers before the first epoch, and after the last batch of an epoch."""

    class Draw(pl.Callback):
        def on_train_start(self, *_):
            torch.rand(3)

    def run(seed, *callbacks, ckpt=None):
        pl.seed_everything(seed, verbose=False)
        module = Classifier(dropout=0.1)
        callbacks = [Draw(), *callbacks]
        run = trainer(plugins=plugin(lora_dropout=0.3), max_epochs=3, callbacks=callbacks, enable_checkpointing=False)
        run.fit(module, loader(shuffle=True), ckpt_path=ckpt)
        return module

    hooks = {"on_train_batch_end": 4, "on_train_epoch_end": 8}
    straight = run(1, *(Save(hook, step, tmp_path / hook) for hook, step in hooks.items()))
    for hook, step in hooks.items():
        assert run(77, ckpt=tmp_path / hook).losses == straight.losses[step:]


def test_a_checkpoint_of_a_cpu_run_does_not_initialize_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: pytest.fail("this initializes CUDA"))
    assert [state.keys() for state in QLoRAPrecision().state_dict()["random_state"]] == [{"cpu"}]


def test_generators_are_restored_and_those_of_other_ranks_are_not():
    torch.manual_seed(1)
    saved = QLoRAPrecision().state_dict()
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    QLoRAPrecision().load_state_dict({**saved, "random_state": 2 * saved["random_state"]})
    assert torch.equal(torch.get_rng_state(), expected)
    QLoRAPrecision().load_state_dict(saved)
    assert torch.equal(torch.get_rng_state(), saved["random_state"][0]["cpu"])


@pytest.mark.parametrize("cache", [True, False])
def test_a_plugin_of_two_trainers_computes_each_module_in_its_own_type(cache, trainer, request):
    request.addfinalizer(lambda: torch.set_autocast_cache_enabled(True))
    torch.set_autocast_cache_enabled(cache)  # a failed ONNX export leaves it off
    one = plugin(compute_dtype="bf16")
    modules = [Classifier().bfloat16(), Classifier()]
    seen = []
    for module, dtype in zip(modules, (torch.bfloat16, torch.float32), strict=True):
        module.forward = lambda x, net=module.net, dtype=dtype: net(x.to(dtype)).float()
        module.net[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
        trainer(plugins=one, max_steps=1).fit(module, loader())
    assert seen == 2 * [torch.bfloat16] and type(modules[1]) is Classifier


def test_a_run_goes_on_in_its_own_type_after_one_of_another_module_in_a_callback(trainer):
    one = plugin(compute_dtype="bf16")
    module, inner = Classifier(), Classifier().bfloat16()
    inner.forward = lambda x: inner.net(x.bfloat16()).float()
    seen = []
    module.net[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))

    class Inner(pl.Callback):
        def on_train_epoch_end(self, run, module):
            trainer(plugins=one).validate(inner, loader(), verbose=False)

    trainer(plugins=one, max_epochs=2, callbacks=[Inner()]).fit(module, loader())
    assert {*seen} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["adapter", "weights only", "full", "dense"])
def test_checkpoints_are_tested_in_a_new_module_which_leaves_the_generator_as_it_is(trainer, kind, tmp_path):
    module = Classifier(seed=3)
    arguments = {"checkpoint": "full" if kind == "full" else "adapter"}
    run = trainer() if kind == "dense" else trainer(plugins=plugin(**arguments))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "c.ckpt", weights_only=kind == "weights only")
    convert(module, r=4, lora_dropout=0.1)
    expected = trainer(plugins=plugin(**arguments)).test(module, loader(), verbose=False)
    other = Classifier(seed=3 if kind in ("adapter", "weights only") else 5)
    states = []
    for path in (tmp_path / "c.ckpt", None):
        torch.manual_seed(2)
        tested = trainer(plugins=plugin(**arguments)).test(other, loader(), ckpt_path=path, verbose=False)
        states.append(torch.get_rng_state())
        assert tested == expected
    assert torch.equal(*states)
    assert torch.equal(other.net[0].packed, module.net[0].packed)
    assert (tmp_path / "c.ckpt").stat().st_size < 60_000 or kind in ("dense", "full")


def test_the_ranks_compare_their_kernels_once_on_the_device_of_the_layers(monkeypatch, trainer):
    """A rank that has used CUDA for something else must not wait there for one that has not."""
    devices = []
    monkeypatch.setattr(precision, "agree", devices.append)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin())
    model = fabric.setup_module(nn.Linear(64, 64))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        fabric.backward(model(torch.randn(2, 64)).sum())
        optimizer.step()
    run = trainer(plugins=plugin(), max_epochs=1)
    run.fit(Classifier(), loader(), loader())
    run.validate(Classifier(), loader())
    trainer(plugins=plugin()).validate(Classifier(), loader())
    assert devices == 3 * [torch.device("cpu")]


def test_a_plugin_that_converted_a_module_and_its_trainer_can_be_copied_and_pickled(trainer):
    run = trainer(plugins=plugin())
    run.fit(Classifier(), loader())
    one = run.precision_plugin
    again = pickle.loads(pickle.dumps(run))
    again.fit_loop.max_epochs = 2
    plugins = pickle.loads(pickle.dumps(one)), copy.deepcopy(one)
    for other in (*(trainer(plugins=each, max_steps=1) for each in plugins), again):
        module = Classifier()
        other.fit(module, loader())
        assert other.precision_plugin.report.converted == ["net.0", "net.4"] and module.net[0].lora_B.any()
