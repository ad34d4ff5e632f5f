"""The plugin in a LightningCLI YAML file and on its command line."""

import dataclasses

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from lightning_qlora import PagedAdamW, QLoRAPrecision, load_from_checkpoint
from lightning_qlora.layers.qlora_linear import adapted_layers
from tests.conftest import Classifier, dataset, loader
from tests.toys import assert_equal

TRAINER = """
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
"""
FORMS = {
    "list": """
  plugins:
    - class_path: lightning_qlora.QLoRAPrecision
      init_args: {r: 4, target_modules: [net.0, net.4], exclude_modules: [], modules_to_save: []}
""",
    "single": """
  plugins:
    class_path: lightning_qlora.QLoRAPrecision
    init_args:
      r: 4
      compute_dtype: fp32
      target_modules: all-linear
      paged_optimizer: auto
""",
    "name": """
  plugins: lightning_qlora.QLoRAPrecision
""",
}


def run(tmp_path, form, *arguments):
    path = tmp_path / "config.yaml"
    path.write_text(TRAINER + FORMS[form])
    return LightningCLI(
        Classifier,
        args=["--config", str(path), f"--trainer.default_root_dir={tmp_path}", *arguments],
        run=False,
        save_config_callback=None,
    )


OPTIMIZER = """
optimizer:
  class_path: {}
  init_args: {{lr: 0.01, weight_decay: 0.01}}
lr_scheduler:
  class_path: torch.optim.lr_scheduler.StepLR
  init_args: {{step_size: 1, gamma: 0.5}}
"""


@pytest.mark.parametrize(
    ("class_path", "kind"),
    [("torch.optim.AdamW", torch.optim.AdamW), ("lightning_qlora.PagedAdamW", PagedAdamW)],
)
def test_the_optimizer_section_of_a_yaml_file_trains_the_adapters(tmp_path, trainer, class_path, kind):
    (tmp_path / "optimizer.yaml").write_text(OPTIMIZER.format(class_path))
    arguments = ["--trainer.max_epochs=3", "--trainer.plugins.lora_dropout=0"]
    cli = run(tmp_path, "single", "--config", str(tmp_path / "optimizer.yaml"), *arguments)
    cli.trainer.fit(cli.model, loader())
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.01 / 8, "the scheduler's optimizer is the one that trains"
    adapters = {id(p) for layer in adapted_layers(cli.model).values() for p in layer.adapter_parameters()}
    assert {id(param) for param in optimizer.state} == adapters

    by_hand = Classifier()
    optimizer = kind(by_hand.parameters(), lr=0.01, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    by_hand.configure_optimizers = lambda: ([optimizer], [scheduler])
    plugin = QLoRAPrecision(**dataclasses.asdict(cli.trainer.precision_plugin.config))
    trainer(plugins=plugin, max_epochs=3, enable_checkpointing=False).fit(by_hand, loader())
    assert cli.model.losses[-1] < cli.model.losses[0]
    assert cli.model.losses == by_hand.losses


def test_a_class_on_the_command_line_is_enough_and_a_run_can_be_resumed(tmp_path):
    optimizer = ["--optimizer", "lightning_qlora.PagedAdamW", "--optimizer.lr=0.01"]
    arguments = [*optimizer, "--trainer.plugins.lora_dropout=0.1", "--seed_everything=1"]

    def fit(epochs, ckpt_path=None):
        cli = run(tmp_path, "single", *arguments, f"--trainer.max_epochs={epochs}")
        cli.trainer.fit(cli.model, loader(), ckpt_path=ckpt_path)
        return cli

    whole = fit(4)
    fit(2).trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(4, tmp_path / "half.ckpt")
    assert resumed.model.losses == whole.model.losses[8:]


class Wide(Classifier):
    """A class that the command line chooses, with an argument of its own."""

    def __init__(self, width: int = 64):
        super().__init__(width)
        self.save_hyperparameters()


def test_a_checkpoint_of_a_class_that_the_command_line_chose_is_loaded(tmp_path):
    arguments = [f"--model={__name__}.Wide", "--model.width=128", f"--trainer.default_root_dir={tmp_path}"]
    (tmp_path / "config.yaml").write_text(TRAINER + FORMS["single"])
    files = ["--config", str(tmp_path / "config.yaml")]
    options = {"run": False, "save_config_callback": None, "subclass_mode_model": True}
    cli = LightningCLI(Classifier, args=[*files, *arguments], **options)
    cli.trainer.fit(cli.model, DataLoader(dataset(width=128), batch_size=8))
    cli.trainer.save_checkpoint(tmp_path / "c.ckpt")
    loaded = load_from_checkpoint(Wide, tmp_path / "c.ckpt")
    assert type(loaded) is Wide and loaded.hparams.width == 128
    assert_equal(loaded.state_dict(), cli.model.state_dict())
    with pytest.raises(ValueError, match=r"c\.ckpt: was saved from a '.*\.Wide', which LightningCLI chose"):
        load_from_checkpoint(BoringModel, tmp_path / "c.ckpt")


def test_each_form_gives_the_arguments_and_the_command_line_overrides(tmp_path):
    assert run(tmp_path, "name").trainer.precision_plugin.config == QLoRAPrecision().config
    expected = QLoRAPrecision(r=4, target_modules=["net.0", "net.4"]).config
    assert run(tmp_path, "list").trainer.precision_plugin.config == expected
    cli = run(tmp_path, "single", "--trainer.plugins.r=2", "--trainer.plugins.init_args.lora_alpha=8")
    config = cli.trainer.precision_plugin.config
    assert (config.r, config.lora_alpha, config.compute_dtype) == (2, 8, "fp32")


def test_print_config_shows_every_argument_and_a_wrong_value_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "single", "--print_config")
    text = capsys.readouterr().out
    for name in ("quant_type: nf4", "block_size: 64", "lora_dropout: 0.05", "checkpoint: adapter"):
        assert name in text
    with pytest.raises(SystemExit):
        run(tmp_path, "single", "--trainer.plugins.quant_type=nf5")
    assert "nf5" in capsys.readouterr().err
