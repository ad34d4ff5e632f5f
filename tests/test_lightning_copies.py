"""The plugin and callback in `pytorch_lightning` and `lightning_fabric`: the results of `lightning`, bit for bit."""

import importlib
import sys

import lightning.fabric as fabric
import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_qlora import PagedOptimizer, QLoRALinear, QLoRAPrecision, load_from_checkpoint, save_adapter
from tests.conftest import loader, make_trainer
from tests.toys import assert_equal

other_pl = pytest.importorskip("pytorch_lightning")
other_fabric = pytest.importorskip("lightning_fabric")


def same_state(first, second):
    assert_equal(first.state_dict(), second.state_dict())


def module_of(package):
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.losses = []
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1), nn.ReLU(), nn.Linear(64, 8))

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Module


def fit(package, root, ckpt_path=None, **arguments):
    torch.manual_seed(0)
    module = module_of(package)()
    arguments = {"max_epochs": 2, "plugins": QLoRAPrecision(r=4), **arguments}
    trainer = make_trainer(root, package, **arguments)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ({}, {}),
        ({"gradient_clip_val": 1e-3}, {}),
        ({"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}, {}),
        ({"accumulate_grad_batches": 2}, {"init_lora_weights": "calibrated"}),
    ],
)
def test_training_is_that_of_lightning(tmp_path, arguments, config):
    runs = []
    for package in (pl, other_pl):
        runs.append(fit(package, tmp_path, plugins=QLoRAPrecision(r=4, **config), **arguments)[0])
    assert runs[0].losses == runs[1].losses
    same_state(*runs)
    assert runs[1].net[0].lora_B.any()


def test_checkpoints_are_those_of_lightning(tmp_path):
    straight, _ = fit(other_pl, tmp_path)
    for package in (pl, other_pl):  # either writes it, the other resumes from it
        trainer = fit(package, tmp_path, max_epochs=1)[1]
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        same_state(fit(other_pl, tmp_path, tmp_path / "half.ckpt")[0], straight)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    loaded = load_from_checkpoint(module_of(other_pl), tmp_path / "half.ckpt")
    same_state(loaded, trainer.lightning_module)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*lora_A"):
        module_of(other_pl).load_from_checkpoint(tmp_path / "half.ckpt")


def test_what_is_refused_in_lightning_is_refused(tmp_path):
    module = module_of(other_pl)()
    module.trainer = other_pl.Trainer(
        plugins=QLoRAPrecision(r=4), strategy="ddp_fork", accelerator="cpu", logger=False, default_root_dir=tmp_path
    )
    with pytest.raises(RuntimeError, match="strategy='ddp_fork' trains in processes spawned or forked"):
        module.trainer.precision_plugin.convert_module(module)


def test_precision_that_a_library_passes_itself(tmp_path):
    """`precision=` beside `plugins=` is refused by Lightning; a strategy may hold the plugin (darts)."""
    with pytest.raises(ValueError, match="Received both `precision=32-true` and `plugins=QLoRAPrecision"):
        fit(other_pl, tmp_path, precision="32-true")
    for package in (pl, other_pl):
        strategy = package.strategies.SingleDeviceStrategy("cpu", precision_plugin=QLoRAPrecision(r=4))
        module, _ = fit(package, tmp_path, plugins=[], precision="32-true", strategy=strategy)
        same_state(module, fit(pl, tmp_path)[0])


def test_fabric_is_that_of_lightning(tmp_path):
    states = []
    for package, modules in ((fabric, pl), (other_fabric, other_pl)):
        torch.manual_seed(0)
        run = package.Fabric(
            accelerator="cpu", devices=1, plugins=QLoRAPrecision(r=4, paged_optimizer=False), callbacks=PagedOptimizer()
        )
        module = run.setup_module(module_of(modules)(), _reapply_compile=False)
        module.mark_forward_method("training_step")
        module._forward_module.log = lambda *_: None
        optimizer = run.setup_optimizers(module.configure_optimizers())
        for index, batch in enumerate(run.setup_dataloaders(loader())):
            run.backward(module.training_step(batch, index))
            run.clip_gradients(module, optimizer, max_norm=0.1)
            optimizer.step()
            optimizer.zero_grad()
        save_adapter(module, tmp_path / modules.__name__)
        run.save(tmp_path / "fabric.ckpt", {"module": module})
        run.load(tmp_path / "fabric.ckpt", {"module": module})
        states.append(module.module)
    same_state(*states)
    assert (tmp_path / "lightning.pytorch" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "pytorch_lightning" / "adapter_model.safetensors"
    ).read_bytes()


def test_our_callbacks_are_those_of_both(tmp_path):
    callback = PagedOptimizer()
    fit(other_pl, tmp_path, plugins=[], callbacks=callback)
    assert isinstance(callback, (pl.Callback, other_pl.Callback))


def test_a_copy_may_be_loaded_after_the_plugin_class(monkeypatch):
    """First a process with lightning_fabric alone, then with pytorch_lightning too."""
    for name in [name for name in sys.modules if name.split(".")[0] == "pytorch_lightning"]:
        monkeypatch.delitem(sys.modules, name)
    plugin = QLoRAPrecision(r=4)
    assert isinstance(plugin, other_fabric.plugins.Precision)
    assert not isinstance(plugin, other_pl.plugins.Precision)
    monkeypatch.undo()
    assert isinstance(QLoRAPrecision(r=4), other_pl.plugins.Precision)


YAML = """
trainer:
  max_steps: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  plugins:
    - class_path: lightning_qlora.QLoRAPrecision
      init_args: {r: 4}
  callbacks:
    - class_path: lightning_qlora.PagedOptimizer
"""


@pytest.mark.parametrize("package", [pl, other_pl])
def test_the_cli_of_both_takes_plugin_and_callback_from_yaml(tmp_path, package):
    """It compares the classes with its own before it makes an object, here in a process that made none yet."""
    cli = importlib.import_module(f"{package.__name__}.cli")
    QLoRAPrecision.__bases__ = QLoRAPrecision.__bases__[:1]
    PagedOptimizer.__bases__ = (pl.Callback,)
    (tmp_path / "config.yaml").write_text(YAML)
    arguments = ["--config", str(tmp_path / "config.yaml"), f"--trainer.default_root_dir={tmp_path}"]
    run = cli.LightningCLI(module_of(package), args=arguments, run=False, save_config_callback=None)
    run.trainer.fit(run.model, loader())
    assert type(run.model.net[0]) is QLoRALinear and run.model.net[0].lora_B.any()
    assert any(isinstance(callback, PagedOptimizer) for callback in run.trainer.callbacks)
