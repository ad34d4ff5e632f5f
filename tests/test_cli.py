"""The plugin in a LightningCLI YAML file and on its command line."""

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_qlora import QLoRALinear, QLoRAPrecision
from tests.conftest import Classifier, loader

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


@pytest.mark.parametrize("form", ["list", "single"])
def test_a_yaml_file_trains(tmp_path, form):
    cli = run(tmp_path, form)
    cli.trainer.fit(cli.model, loader())
    assert isinstance(cli.model.net[0], QLoRALinear)
    assert cli.model.net[0].lora_B.abs().sum() > 0


def test_a_bare_name_takes_the_defaults(tmp_path):
    assert run(tmp_path, "name").trainer.precision_plugin.config == QLoRAPrecision().config


def test_the_command_line_overrides(tmp_path):
    cli = run(tmp_path, "single", "--trainer.plugins.r=2", "--trainer.plugins.init_args.lora_alpha=8")
    config = cli.trainer.precision_plugin.config
    assert (config.r, config.lora_alpha, config.compute_dtype) == (2, 8, "fp32")


def test_help_explains_every_argument(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "single", "--trainer.plugins.help", "lightning_qlora.QLoRAPrecision")
    text = capsys.readouterr().out
    assert "{nf4,fp4,int4}" in text
    assert "Rank of the adapters" in text
    assert "What a checkpoint holds" in text


def test_print_config_shows_every_argument(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "single", "--print_config")
    text = capsys.readouterr().out
    for name in ("quant_type: nf4", "block_size: 64", "lora_dropout: 0.05", "checkpoint: adapter"):
        assert name in text


def test_a_wrong_value_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "single", "--trainer.plugins.quant_type=nf5")
    assert "nf5" in capsys.readouterr().err
